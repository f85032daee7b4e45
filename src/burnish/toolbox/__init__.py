"""Work on adapter files and checkpoints, tensor by tensor: look at, convert, extract, merge, resize, scale, average."""
