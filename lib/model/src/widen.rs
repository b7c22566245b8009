//! A graph in 16 bits as one in 32, so that a processor computes with the
//! weights of a GPU's bundle: its own arithmetic in 16 bits is several times
//! slower, and rounds after every step.

use std::io;
use std::path::Path;
use std::sync::Arc;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use prost::Message;

use crate::onnx::{Model, Node, Tensor, element};

/// A graph in memory, and its weights as the contents of the data file that it
/// names.
pub(crate) struct Widened {
    pub(crate) graph: Vec<u8>,
    pub(crate) data_name: String,
    pub(crate) data: Arc<[u8]>,
}

/// Reads the graph at `path` and the data file beside it.
pub(crate) fn widen(path: &Path) -> io::Result<Widened> {
    let mut model = Model::decode(&*std::fs::read(path)?).map_err(io::Error::other)?;
    let graph = model.graph.get_or_insert_default();
    let mut data_name = String::new();
    let mut outside = Vec::new();
    let mut length = 0;
    for tensor in &mut graph.initializer {
        if let Some(raw) = tensor.raw_data.take() {
            let is_half = tensor.data_type == element::FLOAT16;
            tensor.raw_data = Some(if is_half { wide(&raw) } else { raw });
        } else {
            let place = Place::of(tensor)?;
            data_name = entry(tensor, "location")?.to_owned();
            // Twice as long at twice the offset: what was aligned still is.
            let scale = if tensor.data_type == element::FLOAT16 {
                2
            } else {
                1
            };
            set(tensor, "offset", 2 * place.offset);
            set(tensor, "length", scale * place.length);
            length = length.max(2 * place.offset + scale * place.length);
            outside.push((place, scale));
        }
        if tensor.data_type == element::FLOAT16 {
            tensor.data_type = element::FLOAT;
        }
    }
    for node in &mut graph.node {
        for attribute in &mut node.attribute {
            if node.op_type == "Cast" && attribute.i == Some(i64::from(element::FLOAT16)) {
                attribute.i = Some(i64::from(element::FLOAT));
            }
        }
    }
    graph.node = std::mem::take(&mut graph.node)
        .into_iter()
        .flat_map(unfuse)
        .collect();

    let folder = path.parent().unwrap_or(Path::new("."));
    let file = std::fs::File::open(folder.join(&data_name))?;
    // SAFETY: a bundle's files are replaced, never written in place.
    let halves = unsafe { memmap2::Mmap::map(&file)? };
    let mut data: Arc<[u8]> = std::iter::repeat_n(0, length).collect();
    let wide_data = Arc::get_mut(&mut data).ok_or(io::ErrorKind::Other)?;
    for (place, scale) in outside {
        let bytes = halves
            .get(place.offset..place.offset + place.length)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        let start = 2 * place.offset;
        let target = &mut wide_data[start..start + scale * place.length];
        if scale == 1 {
            target.copy_from_slice(bytes);
        } else {
            widen_into(bytes, target);
        }
    }
    Ok(Widened {
        graph: model.encode_to_vec(),
        data_name,
        data,
    })
}

/// The fused operator of 16 bits as those that a processor is fast at.
fn unfuse(node: Node) -> Vec<Node> {
    if node.op_type != "SkipLayerNormalization" {
        return vec![node];
    }
    let [input, skip, scale, offset, bias] = &node.input[..] else {
        return vec![node];
    };
    let sum = match node.output.get(3) {
        Some(sum) => sum.clone(),
        None => format!("{}.sum", node.name),
    };
    let biased = format!("{}.biased", node.name);
    let of = |part: &str, op: &str, inputs: [&String; 2], output: &String| Node {
        name: format!("{}.{part}", node.name),
        op_type: op.to_owned(),
        input: inputs.map(String::clone).to_vec(),
        output: vec![output.clone()],
        ..Node::default()
    };
    vec![
        of("bias", "Add", [input, bias], &biased),
        of("skip", "Add", [&biased, skip], &sum),
        Node {
            name: node.name.clone(),
            op_type: "LayerNormalization".to_owned(),
            domain: String::new(),
            input: vec![sum.clone(), scale.clone(), offset.clone()],
            output: vec![node.output[0].clone()],
            attribute: node.attribute.clone(),
        },
    ]
}

#[derive(Clone, Copy)]
struct Place {
    offset: usize,
    length: usize,
}

impl Place {
    fn of(tensor: &Tensor) -> io::Result<Self> {
        let number = |key| entry(tensor, key)?.parse().map_err(io::Error::other);
        Ok(Self {
            offset: number("offset")?,
            length: number("length")?,
        })
    }
}

fn entry<'a>(tensor: &'a Tensor, key: &str) -> io::Result<&'a str> {
    let mut entries = tensor.external_data.iter();
    let found = entries.find(|entry| entry.key == key);
    let missing = || io::Error::other(format!("{} has no {key}", tensor.name));
    found.map(|entry| entry.value.as_str()).ok_or_else(missing)
}

fn set(tensor: &mut Tensor, key: &str, value: usize) {
    for entry in &mut tensor.external_data {
        if entry.key == key {
            entry.value = value.to_string();
        }
    }
}

fn wide(halves: &[u8]) -> Vec<u8> {
    let mut floats = vec![0; 2 * halves.len()];
    widen_into(halves, &mut floats);
    floats
}

/// Halves as floats, both little-endian.
fn widen_into(halves: &[u8], floats: &mut [u8]) {
    /// Values at a time: few enough for the stack.
    const CHUNK: usize = 1024;
    let (mut bits, mut values) = ([0u16; CHUNK], [0f32; CHUNK]);
    for (halves, floats) in halves.chunks(2 * CHUNK).zip(floats.chunks_mut(4 * CHUNK)) {
        let count = halves.len() / 2;
        for (bits, half) in bits.iter_mut().zip(halves.chunks_exact(2)) {
            *bits = u16::from_le_bytes([half[0], half[1]]);
        }
        bits[..count]
            .reinterpret_cast::<f16>()
            .convert_to_f32_slice(&mut values[..count]);
        for (float, value) in floats.chunks_exact_mut(4).zip(&values) {
            float.copy_from_slice(&value.to_le_bytes());
        }
    }
}
