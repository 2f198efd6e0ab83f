"""bitsandbytes, imported without its message on CPUs about an optional kernel for inference, and without a compiler.

When it is imported it hands two functions to ``torch.compile``, which would import torch's compiler, a second of a
core. Only NF4 weights with an odd number of columns use them; here they always run uncompiled.
"""

from __future__ import annotations

from typing import Any

import torch

from hsplit.streams import quieten_bitsandbytes


def _uncompiled(function: Any = None, **settings: Any) -> Any:
    return (lambda function: function) if function is None else function


quieten_bitsandbytes()
_compile = torch.compile
torch.compile = _uncompiled  # type: ignore[assignment]  # a stand-in for its every signature
try:
    from bitsandbytes import functional
finally:
    torch.compile = _compile

__all__ = ["functional"]
