"""Numbers <-> bits: formats, packing, solvers, and which part of a model gets how many bits."""

from mixoff.quantize.layout import packed_nbytes as packed_nbytes
from mixoff.quantize.scheme import Precision as Precision
from mixoff.quantize.scheme import Scheme as Scheme
from mixoff.quantize.solve import quantize as quantize
from mixoff.quantize.tensor import QTensor as QTensor
