"""A student measured against its teacher and its baseline, and the report of it."""

from distilljax.evaluation.calibration import bias_calibration as bias_calibration
from distilljax.evaluation.calibration import softmax_mass as softmax_mass
from distilljax.evaluation.measures import measure as measure
from distilljax.evaluation.measures import summarize as summarize
from distilljax.evaluation.report import Report as Report
from distilljax.evaluation.report import report as report
from distilljax.evaluation.samples import Samples as Samples
from distilljax.evaluation.statistics import PairedDifference as PairedDifference
from distilljax.evaluation.statistics import Spread as Spread
from distilljax.evaluation.statistics import mcnemar as mcnemar
from distilljax.evaluation.statistics import paired_difference as paired_difference
from distilljax.evaluation.statistics import sign_test as sign_test
from distilljax.evaluation.statistics import spread as spread
from distilljax.evaluation.statistics import wilson_interval as wilson_interval
