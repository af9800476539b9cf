"""Pruning: channels really removed from any function, and masks for single weights.

`plan` finds channels whose removal equals setting them to zero and makes masks, smaller
parameters and the function for them. `masks` marks single weights, or n of every m.
"""

from jaxaccel.prune._choose import Where as Where
from jaxaccel.prune._criteria import Criterion as Criterion
from jaxaccel.prune._criteria import batchnorm_scale as batchnorm_scale
from jaxaccel.prune._criteria import l1 as l1
from jaxaccel.prune._criteria import l2 as l2
from jaxaccel.prune._criteria import random as random
from jaxaccel.prune._criteria import taylor as taylor
from jaxaccel.prune._make import channels as channels
from jaxaccel.prune._make import plan as plan
from jaxaccel.prune._make import schedule as schedule
from jaxaccel.prune._masks import apply as apply
from jaxaccel.prune._masks import keep as keep
from jaxaccel.prune._masks import magnitude as magnitude
from jaxaccel.prune._masks import masks as masks
from jaxaccel.prune._masks import sparsity as sparsity
from jaxaccel.prune._plan import Plan as Plan
