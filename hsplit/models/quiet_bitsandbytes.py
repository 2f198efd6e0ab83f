"""bitsandbytes, imported without what it says on CPUs of an optional kernel for inference, and without a compiler.

It hands two functions to ``torch.compile`` when it is imported, which imports torch's compiler: a second of a core.
Of what is done here they serve NF4 weights with an odd number of columns alone, which would wait for a C++ compiler
where there is one, and run as they are where there is none. Here they always run as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from hsplit.dependency_messages import quieten_bitsandbytes


def _as_it_is(function: Any = None, **settings: Any) -> Any:
    return (lambda given: given) if function is None else function


quieten_bitsandbytes()
_compile = torch.compile
torch.compile = _as_it_is  # type: ignore[assignment]  # a stand-in for its every signature
try:
    from bitsandbytes import functional
finally:
    torch.compile = _compile

__all__ = ["functional"]
