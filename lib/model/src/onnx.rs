//! The part of the ONNX format that the graphs here need, and a builder over it.
//!
//! The messages carry the field numbers of `onnx/onnx.proto`; the crate `prost` encodes them, so no
//! protobuf compiler is needed.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use half::f16;
use prost::Message;

use crate::files::little_endian;
use crate::precision::Precision;

/// `ModelProto`.
#[derive(Clone, PartialEq, Message)]
pub struct Model {
    #[prost(int64, tag = "1")]
    pub ir_version: i64,
    #[prost(string, tag = "2")]
    pub producer_name: String,
    #[prost(string, tag = "3")]
    pub producer_version: String,
    #[prost(string, tag = "6")]
    pub doc_string: String,
    #[prost(message, optional, tag = "7")]
    pub graph: Option<Graph>,
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSet>,
    #[prost(message, repeated, tag = "14")]
    pub metadata: Vec<StringEntry>,
}

/// `OperatorSetIdProto`.
#[derive(Clone, PartialEq, Message)]
pub struct OperatorSet {
    /// Empty for ONNX's own.
    #[prost(string, tag = "1")]
    pub domain: String,
    #[prost(int64, tag = "2")]
    pub version: i64,
}

/// `StringStringEntryProto`.
#[derive(Clone, PartialEq, Message)]
pub struct StringEntry {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

/// `GraphProto`.
#[derive(Clone, PartialEq, Message)]
pub struct Graph {
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<Node>,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<Tensor>,
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfo>,
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfo>,
}

/// `NodeProto`.
#[derive(Clone, PartialEq, Message)]
pub struct Node {
    /// Names of values; an empty one is an optional input left out.
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    #[prost(string, tag = "3")]
    pub name: String,
    #[prost(string, tag = "4")]
    pub op_type: String,
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<Attribute>,
    #[prost(string, tag = "7")]
    pub domain: String,
}

/// `AttributeProto`.
#[derive(Clone, PartialEq, Message)]
pub struct Attribute {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(float, optional, tag = "2")]
    pub f: Option<f32>,
    #[prost(int64, optional, tag = "3")]
    pub i: Option<i64>,
    #[prost(int64, repeated, tag = "8")]
    pub ints: Vec<i64>,
    #[prost(int32, tag = "20")]
    pub kind: i32,
}

/// `TensorProto`.
#[derive(Clone, PartialEq, Message)]
pub struct Tensor {
    #[prost(int64, repeated, tag = "1")]
    pub dims: Vec<i64>,
    /// One of [`element`].
    #[prost(int32, tag = "2")]
    pub data_type: i32,
    #[prost(string, tag = "8")]
    pub name: String,
    /// Its values, little-endian, where they are inline.
    #[prost(bytes = "vec", optional, tag = "9")]
    pub raw_data: Option<Vec<u8>>,
    /// File, offset and length, where they are outside.
    #[prost(message, repeated, tag = "13")]
    pub external_data: Vec<StringEntry>,
    /// 1 where they are outside.
    #[prost(int32, tag = "14")]
    pub data_location: i32,
}

/// `ValueInfoProto`.
#[derive(Clone, PartialEq, Message)]
pub struct ValueInfo {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub kind: Option<Type>,
}

/// `TypeProto`, of tensors only.
#[derive(Clone, PartialEq, Message)]
pub struct Type {
    #[prost(message, optional, tag = "1")]
    pub tensor: Option<TensorType>,
}

/// `TypeProto.Tensor`.
#[derive(Clone, PartialEq, Message)]
pub struct TensorType {
    /// One of [`element`].
    #[prost(int32, tag = "1")]
    pub element: i32,
    #[prost(message, optional, tag = "2")]
    pub shape: Option<Shape>,
}

/// `TensorShapeProto`.
#[derive(Clone, PartialEq, Message)]
pub struct Shape {
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<Dimension>,
}

/// `TensorShapeProto.Dimension`.
#[derive(Clone, PartialEq, Message)]
pub struct Dimension {
    #[prost(oneof = "DimensionValue", tags = "1, 2")]
    pub value: Option<DimensionValue>,
}

/// The two kinds of dimension.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum DimensionValue {
    #[prost(int64, tag = "1")]
    Fixed(i64),
    #[prost(string, tag = "2")]
    Named(String),
}

/// `TensorProto.DataType`.
pub mod element {
    pub const FLOAT: i32 = 1;
    pub const UINT8: i32 = 2;
    pub const INT8: i32 = 3;
    pub const INT32: i32 = 6;
    pub const INT64: i32 = 7;
    pub const FLOAT16: i32 = 10;
}

/// `AttributeProto.AttributeType`.
mod attribute_kind {
    pub const FLOAT: i32 = 1;
    pub const INT: i32 = 2;
    pub const INTS: i32 = 7;
}

fn attribute(name: &str, kind: i32) -> Attribute {
    Attribute {
        name: name.to_owned(),
        kind,
        ..Attribute::default()
    }
}

pub fn float(name: &str, value: f32) -> Attribute {
    Attribute {
        f: Some(value),
        ..attribute(name, attribute_kind::FLOAT)
    }
}

pub fn int(name: &str, value: i64) -> Attribute {
    Attribute {
        i: Some(value),
        ..attribute(name, attribute_kind::INT)
    }
}

pub fn ints(name: &str, values: &[i64]) -> Attribute {
    Attribute {
        ints: values.to_vec(),
        ..attribute(name, attribute_kind::INTS)
    }
}

/// The operator set of ONNX that the graphs use: the first with LayerNormalization.
const ONNX_OPERATORS: i64 = 17;
/// The version of the format that came with it.
const IR_VERSION: i64 = 8;
/// Domain of ONNX Runtime's fused operators.
pub const CONTRIB: &str = "com.microsoft";

/// Tensors from this size on lie in the data file beside the graph, which ONNX Runtime maps
/// instead of copying; ONNX itself asks for it only above protobuf's 2 GB.
const EXTERNAL_FROM_BYTES: usize = 1024;
/// Where a tensor may begin in the data file. Mapping asks for whole pages; 4 KiB on the machines
/// this runs on.
const EXTERNAL_ALIGNMENT: u64 = 4096;

/// A dimension of an input or output.
#[derive(Clone, Copy, Debug)]
pub enum Dim {
    /// Always this.
    Fixed(usize),
    /// Decided by each run.
    Named(&'static str),
}

/// Collects nodes, and writes weights to the data file as they come, so that no more than one is
/// in memory.
pub struct GraphBuilder {
    graph: Graph,
    precision: Precision,
    data: BufWriter<File>,
    data_name: String,
    offset: u64,
    values: usize,
}

impl GraphBuilder {
    /// Starts a graph whose weights go to `folder/data_name` in `precision`.
    pub fn new(
        name: &str,
        precision: Precision,
        folder: &Path,
        data_name: &str,
    ) -> io::Result<GraphBuilder> {
        let file = File::create(folder.join(data_name))?;
        Ok(GraphBuilder {
            graph: Graph {
                name: name.to_owned(),
                ..Graph::default()
            },
            precision,
            // Weights come in megabytes; the buffer is for the small ones.
            data: BufWriter::with_capacity(1 << 20, file),
            data_name: data_name.to_owned(),
            offset: 0,
            values: 0,
        })
    }

    /// The element type that weights and activations have.
    pub fn float(&self) -> i32 {
        match self.precision {
            Precision::Fp32 | Precision::Int8 => element::FLOAT,
            Precision::Fp16 => element::FLOAT16,
        }
    }

    /// The precision that weights are written in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Declares an input.
    pub fn input(&mut self, name: &str, element: i32, shape: &[Dim]) -> String {
        self.graph.input.push(value_info(name, element, shape));
        name.to_owned()
    }

    /// Declares that the value `from` is the output `name`.
    pub fn output(&mut self, name: &str, element: i32, shape: &[Dim]) {
        self.graph.output.push(value_info(name, element, shape));
    }

    /// A constant of floats in the graph's precision.
    pub fn weight(&mut self, name: &str, shape: &[usize], values: &[f32]) -> io::Result<String> {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        let bytes: Vec<u8> = match self.precision {
            Precision::Fp32 | Precision::Int8 => little_endian(values),
            Precision::Fp16 => {
                let mut bytes = vec![0; values.len() * size_of::<f16>()];
                for (word, &value) in bytes.chunks_exact_mut(size_of::<f16>()).zip(values) {
                    word.copy_from_slice(&f16::from_f32(value).to_le_bytes());
                }
                bytes
            }
        };
        self.constant(name, self.float(), shape, bytes)
    }

    /// A matrix `[into, out]` in 8 bits, and its scale for each column; returns both names.
    pub fn quantized_weight(
        &mut self,
        name: &str,
        into: usize,
        out: usize,
        values: &[f32],
    ) -> io::Result<(String, String)> {
        let mut largest = vec![0.0f32; out];
        for row in values.chunks_exact(out) {
            for (largest, value) in largest.iter_mut().zip(row) {
                *largest = largest.max(value.abs());
            }
        }
        // Symmetric, so that no zero point is needed: -128 is not used.
        let limit = f32::from(i8::MAX);
        // A column of zeros stays one.
        let scales: Vec<f32> = largest
            .iter()
            .map(|&largest| largest.max(f32::MIN_POSITIVE) / limit)
            .collect();
        let mut bytes = Vec::with_capacity(into * out);
        for row in values.chunks_exact(out) {
            for (value, scale) in row.iter().zip(&scales) {
                bytes.push((value / scale).round().clamp(-limit, limit) as i8 as u8);
            }
        }
        let weight = self.constant(name, element::INT8, &[into, out], bytes)?;
        let scale = self.weight(&format!("{name}.scale"), &[out], &scales)?;
        Ok((weight, scale))
    }

    /// A constant index without dimensions.
    pub fn index(&mut self, name: &str, value: i64) -> io::Result<String> {
        self.constant(name, element::INT64, &[], value.to_le_bytes().to_vec())
    }

    /// A constant of 64-bit integers, such as a shape.
    pub fn integers(&mut self, name: &str, values: &[i64]) -> io::Result<String> {
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.constant(name, element::INT64, &[values.len()], bytes)
    }

    fn constant(
        &mut self,
        name: &str,
        data_type: i32,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> io::Result<String> {
        // Shapes and indices are asked for wherever they are needed, and written once.
        if self
            .graph
            .initializer
            .iter()
            .any(|tensor| tensor.name == name)
        {
            return Ok(name.to_owned());
        }
        let mut tensor = Tensor {
            dims: shape.iter().map(|&dim| dim as i64).collect(),
            data_type,
            name: name.to_owned(),
            ..Tensor::default()
        };
        if bytes.len() < EXTERNAL_FROM_BYTES {
            tensor.raw_data = Some(bytes);
        } else {
            let padding = self.offset.next_multiple_of(EXTERNAL_ALIGNMENT) - self.offset;
            self.data.write_all(&vec![0; padding as usize])?;
            self.offset += padding;
            let entry = |key: &str, value: String| StringEntry {
                key: key.to_owned(),
                value,
            };
            tensor.data_location = 1;
            tensor.external_data = vec![
                entry("location", self.data_name.clone()),
                entry("offset", self.offset.to_string()),
                entry("length", bytes.len().to_string()),
            ];
            self.data.write_all(&bytes)?;
            self.offset += bytes.len() as u64;
        }
        self.graph.initializer.push(tensor);
        Ok(name.to_owned())
    }

    /// A node of ONNX's own operators with one output, whose name is returned.
    pub fn node(&mut self, op: &str, inputs: &[&str], settings: &[Attribute]) -> String {
        let output = self.fresh(op);
        self.push("", op, inputs, vec![output.clone()], settings);
        output
    }

    /// A node of ONNX Runtime's fused operators with one output, whose name is returned.
    pub fn contrib(&mut self, op: &str, inputs: &[&str], settings: &[Attribute]) -> String {
        let output = self.fresh(op);
        self.push(CONTRIB, op, inputs, vec![output.clone()], settings);
        output
    }

    /// A node whose outputs are named by the caller; an empty name leaves that output out.
    pub fn push(
        &mut self,
        domain: &str,
        op: &str,
        inputs: &[&str],
        outputs: Vec<String>,
        settings: &[Attribute],
    ) {
        let name = format!("{op}_{}", self.graph.node.len());
        self.graph.node.push(Node {
            input: inputs.iter().map(|&input| input.to_owned()).collect(),
            output: outputs,
            name,
            op_type: op.to_owned(),
            attribute: settings.to_vec(),
            domain: domain.to_owned(),
        });
    }

    /// A name for a value that no other has.
    pub fn fresh(&mut self, stem: &str) -> String {
        self.values += 1;
        format!("{}_{}", stem.to_lowercase(), self.values)
    }

    /// Writes the graph to `path` and returns nothing more to write.
    pub fn finish(mut self, path: &Path, metadata: &[(&str, String)]) -> io::Result<()> {
        self.data.flush()?;
        let opset = |domain: &str, version| OperatorSet {
            domain: domain.to_owned(),
            version,
        };
        let model = Model {
            ir_version: IR_VERSION,
            producer_name: env!("CARGO_PKG_NAME").to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            doc_string: String::new(),
            graph: Some(self.graph),
            opset_import: vec![opset("", ONNX_OPERATORS), opset(CONTRIB, 1)],
            metadata: metadata
                .iter()
                .map(|(key, value)| StringEntry {
                    key: (*key).to_owned(),
                    value: value.clone(),
                })
                .collect(),
        };
        std::fs::write(path, model.encode_to_vec())
    }
}

fn value_info(name: &str, element: i32, shape: &[Dim]) -> ValueInfo {
    let dim = shape
        .iter()
        .map(|dim| Dimension {
            value: Some(match dim {
                Dim::Fixed(size) => DimensionValue::Fixed(*size as i64),
                Dim::Named(name) => DimensionValue::Named((*name).to_owned()),
            }),
        })
        .collect();
    ValueInfo {
        name: name.to_owned(),
        kind: Some(Type {
            tensor: Some(TensorType {
                element,
                shape: Some(Shape { dim }),
            }),
        }),
    }
}
