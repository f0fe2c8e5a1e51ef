"""What TensorRT's parser has and lacks, as TensorRT for RTX 1.7 shows it; the tests hold this against the library."""

from __future__ import annotations

from onnx import TensorProto

__all__ = [
    "CONTROL_FLOW",
    "DATA_DEPENDENT",
    "FLOATS_ONLY",
    "INTEGERS",
    "INTEGER_QUANTIZATION",
    "KNOWN_TYPES",
    "NO_NUMBERS",
    "QDQ",
    "QUANTIZED",
    "QUANTIZING",
    "SCATTERS",
    "UNSUPPORTED",
]

# Operators of the default domain that the parser has no importer for.
UNSUPPORTED = frozenset(
    [
        "AffineGrid",
        "Bernoulli",
        "BitCast",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "CenterCropPad",
        "Col2Im",
        "Compress",
        "ConcatFromSequence",
        "ConvInteger",
        "CumProd",
        "DFT",
        "DeformConv",
        "Det",
        "DynamicQuantizeLinear",
        "ImageDecoder",
        "MatMulInteger",
        "MaxRoiPool",
        "MaxUnpool",
        "MelWeightMatrix",
        "Multinomial",
        "NegativeLogLikelihoodLoss",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
        "QLinearConv",
        "QLinearMatMul",
        "RegexFullMatch",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SequenceMap",
        "SoftmaxCrossEntropyLoss",
        "SplitToSequence",
        "StringConcat",
        "StringNormalizer",
        "StringSplit",
        "SwiGLU",
        "TfIdfVectorizer",
        "Unique",
    ]
)
INTEGER_QUANTIZATION = {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"}
QDQ = {"QuantizeLinear", "DequantizeLinear"}
QUANTIZING = QDQ | INTEGER_QUANTIZATION
SCATTERS = {"Scatter", "ScatterElements", "ScatterND"}
DATA_DEPENDENT = {"NonZero", "NonMaxSuppression", "Unique", "Compress"}
CONTROL_FLOW = {"If", "Loop", "Scan"}
FLOATS_ONLY = {"MatMul", "Gemm", "Einsum", "Relu", "Softmax"}
QUANTIZED = {TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1}
KNOWN_TYPES = {
    *QUANTIZED,
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.UINT8,
}
NO_NUMBERS = {TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128}
INTEGERS = {TensorProto.INT8, TensorProto.INT32, TensorProto.INT64}
