"""Process settings: the environment variables `SDGRAPH_*`, read once, in deployments/app.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from config.precision import WantedPrecision
from config.sources import TVM_CACHE


class Settings(BaseSettings):
    """What differs from machine to machine; what differs from graph to graph is in AppArgs."""

    model_config = SettingsConfigDict(env_prefix="SDGRAPH_", frozen=True, extra="ignore", use_attribute_docstrings=True)

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of all tensors; `auto` is CUDA if Ray gave the replica a GPU, else the CPU."""
    torch_threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch in each replica; by default the number of the machine's cores."""
    tvm_cache: Path = TVM_CACHE
    """Folder of compiled UNets, which `make compile` fills."""
    tvm_precision: WantedPrecision = "auto"
    """Number format in which UNets on CPUs multiply, with tvm and with torch; `auto` is bfloat16 if the processor has
    instructions for it, else float32."""
    api_keys_file: Path | None = None
    """File with lines `<name> <sha256 of the key in hex>`; required unless the graph has `auth: none`."""
    rate_limit: str | None = "60/minute"
    """Requests that a key may send, in the notation of `limits`; empty means no limit."""
    pixel_steps_per_day: int | None = Field(default=None, gt=0)
    """Work that a key may request in 24 hours: the sum of steps x width x height."""
    limits_store: str = Field(default="memory://", repr=False)
    """Where both limits are counted: in each ingress replica separately, or for all in `redis://[:password@]host:port`."""
    c2pa_certificates: Path | None = None
    """PEM chain whose first certificate signs every picture's content credentials; needs the extra `c2pa`."""
    c2pa_private_key: Path | None = None
    """PEM key of that certificate, without a password."""
    c2pa_timestamp_url: str | None = None
    """Timestamp authority (RFC 3161) that stamps every signature."""
    picture_store: str | None = Field(default=None, repr=False)
    """Object store for pictures that are requested as links (OpenAI's `url`): `s3://bucket/folder`, `gs://...` or
    `az://...`, with credentials in that store's usual variables; needs the extra `links`. Without a store, links
    are data URIs."""
    picture_link_s: int = Field(default=3600, gt=0, le=7 * 86400)
    """Seconds until such a link expires."""
    log_format: Literal["text", "json"] = "text"
    """Format of log lines: text, or one JSON object for each line."""
    cors_origins: str = ""
    """Sites whose pages may send requests, separated by commas, such as `https://a.example`; `*` for all."""
    deadline_s: float = Field(default=600, gt=0)
    """Seconds after which an unfinished request gets a 504."""
    max_body_bytes: int = Field(default=32 * 2**20, gt=0)
    """Largest body of a request; more is a 413."""
    max_image_pixels: int = Field(default=25_000_000, gt=0)
    """Largest picture a client may send, in decoded pixels; more is a 413."""
    max_pixel_steps: int = Field(default=100 * 2048 * 2048, gt=0)
    """Budget of one request: steps x width x height."""

    def sites(self) -> tuple[str, ...]:
        """The entries of `cors_origins`."""
        return tuple(site.strip().rstrip("/") for site in self.cors_origins.split(",") if site.strip())
