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
    """Where tensors live; `auto` is CUDA where a replica was given a GPU, else the CPU."""
    torch_threads: int | None = Field(default=None, ge=1)
    """CPU threads of each replica's torch; the machine's cores by default."""
    tvm_cache: Path = TVM_CACHE
    """Folder of compiled UNets, which `make compile` fills."""
    tvm_precision: WantedPrecision = "auto"
    """Numbers that UNets on CPUs multiply, compiled ones and torch's; `auto` is bfloat16 where the processor multiplies
    it, else float32."""
    api_keys_file: Path | None = None
    """Lines `<name> <sha256 of the key in hex>`; needed unless the graph says `auth: none`."""
    rate_limit: str | None = "60/minute"
    """Requests a key may send, in `limits` notation; empty for any number."""
    pixel_steps_per_day: int | None = Field(default=None, gt=0)
    """Work a key may ask for in 24 hours, steps x width x height."""
    limits_store: str = Field(default="memory://", repr=False)
    """Where the two are counted: each ingress replica for itself, or all in `redis://[:password@]host:port`."""
    c2pa_certificates: Path | None = None
    """PEM chain whose first certificate signs every picture's content credentials; needs the extra `c2pa`."""
    c2pa_private_key: Path | None = None
    """PEM key of that certificate, without a password."""
    c2pa_timestamp_url: str | None = None
    """Timestamp authority (RFC 3161) that is asked for every picture."""
    picture_store: str | None = Field(default=None, repr=False)
    """Object store for pictures that are asked for as links (OpenAI's `url`): `s3://bucket/folder`, `gs://...` or
    `az://...`, with credentials in that store's usual variables; needs the extra `links`. Without it links are data
    URIs."""
    picture_link_s: int = Field(default=3600, gt=0, le=7 * 86400)
    """Seconds that such a link is good for."""
    log_format: Literal["text", "json"] = "text"
    """Log lines for people, or one JSON object each."""
    cors_origins: str = ""
    """Sites whose pages may ask this server, with commas between them, such as `https://a.example`; `*` for any."""
    deadline_s: float = Field(default=600, gt=0)
    """Seconds after which an unfinished request is answered 504."""
    max_body_bytes: int = Field(default=32 * 2**20, gt=0)
    """Largest body of a request; more is a 413."""
    max_image_pixels: int = Field(default=25_000_000, gt=0)
    """Largest picture a client may send, in decoded pixels; more is a 413."""
    max_pixel_steps: int = Field(default=100 * 2048 * 2048, gt=0)
    """Budget of one request: steps x width x height."""

    def sites(self) -> tuple[str, ...]:
        """The entries of `cors_origins`."""
        return tuple(site.strip().rstrip("/") for site in self.cors_origins.split(",") if site.strip())
