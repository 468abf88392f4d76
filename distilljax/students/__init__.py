"""What is put beside a student, or made of a teacher, to be trained."""

from .._in_place import Projected as Projected
from .projection import Projection as Projection
