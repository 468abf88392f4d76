"""Text: documents, tokenizers, chat templates, and rows packed with documents.

Documents and a tokenizer make a `Tokenized`, which is encoded once and kept on disk;
`Packed` plans its rows ahead, so that they are a source like any other: a `Loader`
reads them in an order of its own, stops and resumes anywhere, on any number of
processes. Tokenizers, jinja2 and pyarrow are imported when something needs them.
"""

from __future__ import annotations

from distilljax.data.text.byte_tokenizer import ByteTokenizer as ByteTokenizer
from distilljax.data.text.chat import ChatTemplate as ChatTemplate
from distilljax.data.text.documents import Documents as Documents
from distilljax.data.text.documents import DocumentsConfig as DocumentsConfig
from distilljax.data.text.documents import Texts as Texts
from distilljax.data.text.filters import Split as Split
from distilljax.data.text.gguf import GgufTokenizer as GgufTokenizer
from distilljax.data.text.jsonl import Jsonl as Jsonl
from distilljax.data.text.mixture import Mixture as Mixture
from distilljax.data.text.packed import Packed as Packed
from distilljax.data.text.packing import shift as shift
from distilljax.data.text.padded import Padded as Padded
from distilljax.data.text.parquet import Parquet as Parquet
from distilljax.data.text.plain import TextFiles as TextFiles
from distilljax.data.text.records import ArrayRecordText as ArrayRecordText
from distilljax.data.text.records import TfdsText as TfdsText
from distilljax.data.text.report import summarize as summarize
from distilljax.data.text.store import Tokenized as Tokenized
from distilljax.data.text.streaming import StreamLoader as StreamLoader
from distilljax.data.text.tokenizer import SentencePiece as SentencePiece
from distilljax.data.text.tokenizer import Tokenizer as Tokenizer
from distilljax.data.text.tokenizer import TokenizerConfig as TokenizerConfig
from distilljax.data.text.tokenizer import TokenizerJson as TokenizerJson
from distilljax.data.text.tokenizer import check_vocabulary as check_vocabulary
from distilljax.data.text.wordnet import WordNetGlosses as WordNetGlosses
