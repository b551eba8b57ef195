"""Runs warp-specialised Gluon kernels for Hopper on the CPU, in random interleavings.

`loading.py`: a package's kernels on stand-ins for Gluon's modules; `language.py`: the stand-ins;
`schedule.py`: partitions, events and whose turn it is; `memory.py`: shared memory, barriers and
copies; `numbers.py`: integers as the GPU has them. README.md says what is modelled.
"""

from gluon_emulator.loading import Emulated, load
from gluon_emulator.schedule import Fault

__all__ = ["Emulated", "Fault", "load"]
