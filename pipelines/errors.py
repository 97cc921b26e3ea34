"""Every exception this project raises on purpose.

SdgraphError
├── RequestError            the caller's fault; `param` names the request field
│   ├── InvalidValueError       out of range, or not allowed for this model
│   │   └── UncompiledError         what compiled UNets cannot do, and torch can
│   ├── NonFiniteError          values that are not finite numbers, where a picture should be
│   ├── UnavailableModelError   unknown or unserved model
│   └── TooLargeError           a body or a picture over the limit
├── OverloadedError         the request would not finish in time; `retry_after` is whole seconds
├── UnstartableError        a deployment the request needs keeps failing to start
├── SilentLibraryError      the volume of a library does not answer
├── DeadlineError           it took longer than the server allows
├── WeightsError            weights are missing, not safetensors, or not what the catalog says
├── LostDeviceError         a replica's GPU failed it for good; Serve replaces the replica
├── BackendError            backend tvm was asked for by name and failed
└── DenoiseError            a tick failed; reaches the jobs that were in it and no other
"""

from __future__ import annotations


class SdgraphError(Exception):
    """Whatever this project raises on purpose."""


class RequestError(SdgraphError):
    """A request that cannot be served as it stands. The message names the wrong value and the allowed ones."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class InvalidValueError(RequestError):
    """A value out of range or not allowed for this model."""


class UncompiledError(InvalidValueError):
    """What compiled UNets cannot do, and torch can, such as a prompt that is longer than they read.

    It is the caller's fault only where backend tvm was asked for by name.
    """


class NonFiniteError(RequestError):
    """Values that are not finite numbers, where a picture should be: a sampler, a LoRA or a scale too strong.

    A black picture would hide it. The message names what the request can change.
    """


class UnavailableModelError(RequestError):
    """An unknown model, or one this server does not serve."""


class TooLargeError(RequestError):
    """A body, or a picture after decoding, over the limit."""


class OverloadedError(SdgraphError):
    """The queue is too long to finish a request before its deadline, so it is refused at once."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class UnstartableError(SdgraphError):
    """A deployment that a request needs keeps failing to start; the message is its name."""


class SilentLibraryError(SdgraphError):
    """The volume of a library does not answer."""

    def __init__(self) -> None:
        super().__init__("the library's folders do not answer; what was known of them before is served meanwhile")


class DeadlineError(SdgraphError):
    """A request that was not finished in time."""


class WeightsError(SdgraphError):
    """Weights that are missing, damaged, pickled, or contradict the catalog.

    The message begins `<what>, file <name>: `, which is all of it that a client is shown.
    """


class LostDeviceError(SdgraphError):
    """The GPU's driver answers every call of this process with an error; only a new process can recover."""


class BackendError(SdgraphError):
    """A backend that the request named failed; the request may succeed on another one."""


class DenoiseError(SdgraphError):
    """A tick raised; the message carries the cause's type and text."""
