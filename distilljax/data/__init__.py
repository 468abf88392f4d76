"""Data: sources of examples, and pipelines that can stop and resume anywhere.

A source says where examples are, a `Loader` turns a source into batches, and
`prefetch_to_device` sends them ahead. Grain, TensorFlow Datasets and ArrayRecord are
imported when something that needs them is called, so importing this is cheap.
"""

from __future__ import annotations

from distilljax.data.array_record import ArrayRecord as ArrayRecord
from distilljax.data.array_record import decode_example as decode_example
from distilljax.data.array_record import encode_example as encode_example
from distilljax.data.array_record import write_array_record as write_array_record
from distilljax.data.augment import Augment as Augment
from distilljax.data.augment import RandomShift as RandomShift
from distilljax.data.finish import Batch as Batch
from distilljax.data.hashing import random_integers as random_integers
from distilljax.data.hashing import random_uniform as random_uniform
from distilljax.data.idx import Idx as Idx
from distilljax.data.idx import read_idx as read_idx
from distilljax.data.labels import labels_of as labels_of
from distilljax.data.one_pass import eval_batches as eval_batches
from distilljax.data.pipeline import Loader as Loader
from distilljax.data.pipeline import ResumableIterator as ResumableIterator
from distilljax.data.prefetch import prefetch_to_device as prefetch_to_device
from distilljax.data.selections import Few as Few
from distilljax.data.selections import Slice as Slice
from distilljax.data.selections import Stratified as Stratified
from distilljax.data.selections import WithoutClasses as WithoutClasses
from distilljax.data.signals import check_signal as check_signal
from distilljax.data.sources import Arrays as Arrays
from distilljax.data.sources import Example as Example
from distilljax.data.sources import Source as Source
from distilljax.data.sources import SourceConfig as SourceConfig
from distilljax.data.sources import load_in_memory as load_in_memory
from distilljax.data.tfds import Tfds as Tfds
