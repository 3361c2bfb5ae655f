#!/usr/bin/env bash
# A bound of an integer field that does not fit in 64 bits is taken when the class is declared. It
# is refused only when a value is decoded, whatever the value is, and as a ValueError that is not
# msgspec's own ValidationError. The same bound of a float field works.
# Seen with msgspec==0.23.0 on Python 3.11, Linux, CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check msgspec==0.23.0
cd "$work"
"$work/venv/bin/python" >output <<'PYTHON'
from dataclasses import dataclass
from typing import Annotated

import msgspec


@dataclass
class Whole:
    macs: Annotated[int, msgspec.Meta(lt=10**21)]


@dataclass
class Real:
    macs: Annotated[float, msgspec.Meta(lt=10**21)]


print("declared")
for kind in (Whole, Real):
    try:
        print(kind.__name__, msgspec.json.decode(b'{"macs": 1}', type=kind).macs)
    except ValueError as error:
        print(kind.__name__, type(error).__name__, isinstance(error, msgspec.ValidationError))
PYTHON
cat output
diff - output <<'SEEN'
declared
Whole ValueError False
Real 1.0
SEEN
