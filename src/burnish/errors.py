"""Every error Burnish raises on purpose.

    BurnishError
    ├── UserError              exit code 2: the input can be corrected
    │   ├── ConfigError        the YAML, an override or the environment
    │   ├── DataError          pictures, captions, sources
    │   ├── ModelError         weights missing, damaged or of another family
    │   └── AdapterError       targets that match nothing, an adapter that does not fit
    ├── MachineError           exit code 3: the machine cannot do it
    │   ├── OutOfMemory        GPU or host memory
    │   ├── DiskFull           no space, read-only or not writable
    │   └── MissingPackage     an optional package is needed
    ├── TrainingError          exit code 1: the run itself failed
    │   ├── NonFiniteLoss      NaN or inf in a loss or a gradient
    │   ├── CheckpointError    nothing that verifies to resume from
    │   └── ExportError        a written adapter does not read back as trained
    └── Interrupted            130 or 143: a signal asked the run to stop

A message says what happened, with values; `remedy` says what to do about it.
"""

from __future__ import annotations


class BurnishError(Exception):
    """Root of the tree. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}" if self.remedy else self.message


class UserError(BurnishError):
    exit_code = 2


class ConfigError(UserError):
    """One or more problems in a config; `problems` holds each as its own readable text."""

    def __init__(self, message: str, *, problems: tuple[str, ...] = (), remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.problems = problems


class DataError(UserError):
    pass


class ModelError(UserError):
    pass


class AdapterError(UserError):
    pass


class MachineError(BurnishError):
    exit_code = 3


class OutOfMemory(MachineError):
    pass


class DiskFull(MachineError):
    pass


class MissingPackage(MachineError):
    pass


class TrainingError(BurnishError):
    pass


class NonFiniteLoss(TrainingError):
    """Loss or gradient is NaN or inf; the weights were left as they were before the step.

    `positions` are the micro-steps of the step at fault, where it is known.
    """

    positions: tuple[int, ...] = ()


class CheckpointError(TrainingError):
    pass


class ExportError(TrainingError):
    pass


class Interrupted(BurnishError):
    """A signal asked the run to stop; the state was saved at `step`."""

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
