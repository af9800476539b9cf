"""What a function costs and how long it takes.

``cost`` and ``macs`` read the compiler's own counts, ``compare`` is the one source of speed
claims, and ``table``, ``interval`` and ``paired`` print and judge what experiments find.
"""

from jaxaccel._table import table as table
from jaxaccel.measure._compare import Comparison as Comparison
from jaxaccel.measure._compare import Row as Row
from jaxaccel.measure._compare import compare as compare
from jaxaccel.measure._cost import Cost as Cost
from jaxaccel.measure._cost import cost as cost
from jaxaccel.measure._cost import macs as macs
from jaxaccel.measure._fusions import Fusions as Fusions
from jaxaccel.measure._fusions import Kernel as Kernel
from jaxaccel.measure._fusions import fusions as fusions
from jaxaccel.measure._interval import Interval as Interval
from jaxaccel.measure._interval import interval as interval
from jaxaccel.measure._interval import paired as paired
