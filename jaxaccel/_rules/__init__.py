"""How each primitive ties the axes of its operands and results, and how it runs at other sizes.

One table, filled by the modules of this package from a small vocabulary.
"""

from jaxaccel._rules import contractions, elementwise, indexing, loops, shapes
from jaxaccel._rules._table import Cut as Cut
from jaxaccel._rules._table import register_rule as register_rule
from jaxaccel._rules._table import rule_of as rule_of
from jaxaccel._rules.elements import few_integers as few_integers
from jaxaccel._rules.elements import known_elements as known_elements
from jaxaccel._rules.elementwise import constant as constant
from jaxaccel._rules.loops import cotangent as cotangent

del contractions, elementwise, indexing, loops, shapes
