//! The two towers of CLIP as ONNX graphs.
//!
//! What is compiled is not the reference's sequence of operators but its function:
//!
//! - pixels arrive as bytes; `(pixel / 255 − mean) / deviation` is folded into the patch weights;
//! - the patch convolution, whose stride is its size, is a matrix product over reordered pixels;
//! - a key's bias adds the same to every score of a query, which softmax ignores, so it is dropped;
//!   a value's bias passes the softmax unchanged, so it moves into the output projection's bias;
//! - QuickGELU `x · σ(1.702 x)` is SiLU between weights scaled by 1.702 and by its inverse;
//! - in the last block only one row is read afterwards (the class token's, or the end of text's),
//!   so only that row's perceptron is computed, and in the vision tower only its query.
//!
//! All of these are exact but for rounding.
//!
//! The two precisions are compiled for the machines that they are meant for. In 32 bits a product
//! takes its bias along (`Gemm`), and addition and normalisation are operators of their own:
//! measured on CPUs, ONNX Runtime's fused `SkipLayerNormalization` is scalar code there, five times
//! as slow as the two. In 16 bits bias, addition and normalisation are that one fused operator,
//! which saves trips to a GPU's memory.

use std::io;
use std::path::Path;

use thiserror::Error;

use crate::architecture::{Activation, Architecture, Transformer};
use crate::checkpoint::{
    ATTENTION_NORM, ATTENTION_OUT, Checkpoint, CheckpointError, Linear, Norm, PERCEPTRON_IN,
    PERCEPTRON_NORM, PERCEPTRON_OUT, Tower, transpose,
};
use crate::onnx::{CONTRIB, Dim, GraphBuilder, element, float, int, ints};
use crate::precision::Precision;

/// Mean of each channel over the images that CLIP was trained on, of values between 0 and 1.
pub const PIXEL_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Standard deviation of each channel, likewise.
pub const PIXEL_DEVIATION: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
/// The largest value of a pixel's byte.
const PIXEL_MAX: f64 = 255.0;
/// Added to the variance by every layer normalisation of CLIP.
const NORM_EPSILON: f32 = 1e-5;
/// The factor in QuickGELU.
const QUICK_GELU: f32 = 1.702;

/// Name of the vision graph's input.
pub const VISION_INPUT: &str = "pixels";
/// Name of the text graph's input.
pub const TEXT_INPUT: &str = "tokens";
/// Name of both graphs' output.
pub const OUTPUT: &str = "embeddings";

/// Why a tower cannot be compiled.
#[allow(missing_docs)] // The messages say it.
#[derive(Debug, Error)]
pub enum CompileError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("cannot write a graph: {0}")]
    Write(#[from] io::Error),
}

/// Where a tower's graph goes.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The folder.
    pub folder: &'a Path,
    /// File name of the graph.
    pub graph: &'a str,
    /// File name of its weights.
    pub data: &'a str,
    /// The arithmetic.
    pub precision: Precision,
}

/// Compiles one tower. `progress` is called once for each block compiled.
pub fn compile(
    checkpoint: &Checkpoint,
    tower: Tower,
    target: Target<'_>,
    progress: &dyn Fn(),
) -> Result<(), CompileError> {
    let name = match tower {
        Tower::Vision => "clip-vision",
        Tower::Text => "clip-text",
    };
    let graph = GraphBuilder::new(name, target.precision, target.folder, target.data)?;
    let mut compiler = Compiler {
        checkpoint,
        tower,
        graph,
        progress,
    };
    match tower {
        Tower::Vision => compiler.vision()?,
        Tower::Text => compiler.text()?,
    }
    let architecture = checkpoint.architecture();
    let mut metadata = vec![("clip.model", architecture.name())];
    if let Some(seed) = checkpoint.synthesized_seed() {
        metadata.push((
            "clip.weights",
            format!("SYNTHESIZED, seed {seed}: embeddings mean nothing"),
        ));
    }
    let path = target.folder.join(target.graph);
    Ok(compiler.graph.finish(&path, &metadata)?)
}

/// Blocks of both towers, for a progress bar.
pub fn blocks(architecture: &Architecture, with_text: bool) -> u64 {
    let text = if with_text {
        architecture.text.transformer.layers
    } else {
        0
    };
    (architecture.vision.transformer.layers + text) as u64
}

/// The stream that blocks add to, `[batch · tokens, width]`.
struct Stream {
    trunk: String,
    /// The stream normalised for what comes next.
    normalised: String,
}

struct Compiler<'a> {
    checkpoint: &'a Checkpoint,
    tower: Tower,
    graph: GraphBuilder,
    progress: &'a dyn Fn(),
}

impl Compiler<'_> {
    fn transformer(&self) -> Transformer {
        *self.checkpoint.transformer(self.tower)
    }

    fn vision(&mut self) -> Result<(), CompileError> {
        let architecture = *self.checkpoint.architecture();
        let vision = architecture.vision;
        let (grid, patch, width) = (vision.grid(), vision.patch_size, vision.transformer.width);
        let side = grid * patch;
        let mut pixels = self.graph.input(
            VISION_INPUT,
            element::UINT8,
            &[
                Dim::Named("batch"),
                Dim::Fixed(vision.image_size),
                Dim::Fixed(vision.image_size),
                Dim::Fixed(3),
            ],
        );
        if side != vision.image_size {
            let starts = self.graph.integers("pixels.start", &[0, 0])?;
            let ends = self
                .graph
                .integers("pixels.end", &[side as i64, side as i64])?;
            let axes = self.graph.integers("pixels.axes", &[1, 2])?;
            pixels = self
                .graph
                .node("Slice", &[&pixels, &starts, &ends, &axes], &[]);
        }

        // Rows of patches while still bytes: [batch · grid, patch, grid, 3 · patch] with the two
        // inner dimensions swapped.
        let line = (3 * patch) as i64;
        let rows = self
            .graph
            .integers("patches.rows", &[-1, patch as i64, grid as i64, line])?;
        let strips = self.graph.node("Reshape", &[&pixels, &rows], &[]);
        let order = ints("perm", &[0, 2, 1, 3]);
        let strips = self.graph.node("Transpose", &[&strips], &[order]);
        let patch_values = 3 * patch * patch;
        let flat = self.graph.integers(
            "patches.flat",
            &[-1, (grid * grid) as i64, patch_values as i64],
        )?;
        let patches = self.graph.node("Reshape", &[&strips, &flat], &[]);
        let float = i64::from(self.graph.float());
        let mut patches = self.graph.node("Cast", &[&patches], &[int("to", float)]);

        let (patch_weight, patch_bias, centre) = self.patch_weights()?;
        if let Some(centre) = centre {
            // Both are exact in 16 bits: whole numbers up to 255, and a power of two.
            let values: Vec<f32> = centre.iter().copied().cycle().take(patch_values).collect();
            let centre = self
                .graph
                .weight("patches.centre", &[patch_values], &values)?;
            patches = self.graph.node("Sub", &[&patches, &centre], &[]);
            let scale =
                self.graph
                    .weight("patches.scale", &[1], &[1.0 / HALF_PIXEL_SCALE as f32])?;
            patches = self.graph.node("Mul", &[&patches, &scale], &[]);
        }
        let weight = self
            .graph
            .weight("patches.weight", &[patch_values, width], &patch_weight)?;
        drop(patch_weight);
        let embedded = self.graph.node("MatMul", &[&patches, &weight], &[]);

        // A row of zeros where the class token goes, then one addition for class token, bias and
        // positions: cheaper than repeating the class token for the batch's size.
        let mut positions = self.checkpoint.positions(Tower::Vision)?;
        let class_token = self.checkpoint.class_token()?;
        for (token, row) in positions.chunks_exact_mut(width).enumerate() {
            let addend = if token == 0 {
                &class_token
            } else {
                &patch_bias
            };
            for (value, add) in row.iter_mut().zip(addend) {
                *value += add;
            }
        }
        let positions = self
            .graph
            .weight("positions", &[1, vision.tokens(), width], &positions)?;
        let padding = self.graph.integers("class.padding", &[0, 1, 0, 0, 0, 0])?;
        let padded = self.graph.node("Pad", &[&embedded, &padding], &[]);
        let tokens = self.graph.node("Add", &[&padded, &positions], &[]);
        let flat = self.graph.integers("flat", &[-1, width as i64])?;
        let tokens = self.graph.node("Reshape", &[&tokens, &flat], &[]);
        let norm = self.checkpoint.norm_before()?;
        let trunk = self.normalise(&tokens, "before", &norm)?;
        let deep = self
            .graph
            .integers("deep", &[-1, vision.tokens() as i64, width as i64])?;
        let shapes = Shapes { flat, deep };
        let last = self.transformer_blocks(trunk, &shapes, &Row::First)?;
        self.project(&last, architecture.dimensions)
    }

    /// The patch convolution as `[3 · patch², width]` over byte pixels, its bias, and what is
    /// subtracted from the pixels first, if anything.
    fn patch_weights(&self) -> Result<PatchWeights, CompileError> {
        let vision = self.checkpoint.architecture().vision;
        let (patch, width) = (vision.patch_size, vision.transformer.width);
        let convolution = self.checkpoint.patch_convolution()?;
        let (centre, scale) = match self.graph.precision() {
            Precision::Fp32 | Precision::Int8 => (None, 1.0),
            // In 16 bits the mean must not wait until after the product: what is left of a sum
            // would be smaller than the sum's rounding.
            Precision::Fp16 => (
                Some(PIXEL_MEAN.map(|mean| (mean * PIXEL_MAX).round())),
                HALF_PIXEL_SCALE,
            ),
        };
        let mut weight = vec![0.0f32; convolution.len()];
        let mut bias = vec![0.0f64; width];
        let area = patch * patch;
        for (output, filters) in convolution.chunks_exact(3 * area).enumerate() {
            for (channel, filter) in filters.chunks_exact(area).enumerate() {
                let deviation = PIXEL_DEVIATION[channel];
                let subtracted = centre.map_or(0.0, |centre| centre[channel]);
                let rest = PIXEL_MEAN[channel] - subtracted / PIXEL_MAX;
                for (position, &value) in filter.iter().enumerate() {
                    let value = f64::from(value);
                    weight[(position * 3 + channel) * width + output] =
                        (value * scale / (PIXEL_MAX * deviation)) as f32;
                    bias[output] -= value * rest / deviation;
                }
            }
        }
        let bias = bias.into_iter().map(|value| value as f32).collect();
        Ok((
            weight,
            bias,
            centre.map(|centre| centre.map(|value| value as f32)),
        ))
    }

    fn text(&mut self) -> Result<(), CompileError> {
        let architecture = *self.checkpoint.architecture();
        let text = architecture.text;
        let width = text.transformer.width;
        let ids = self.graph.input(
            TEXT_INPUT,
            element::INT32,
            &[Dim::Named("batch"), Dim::Named("tokens")],
        );
        let table = self.checkpoint.token_embedding()?;
        let table = self
            .graph
            .weight("tokens.weight", &[text.vocabulary, width], &table)?;
        let embedded = self.graph.node("Gather", &[&table, &ids], &[]);
        // No token sees a later one, so nothing after the end of text is read: a text may be cut
        // there, and the positions are cut to its length.
        let positions = self.checkpoint.positions(Tower::Text)?;
        let positions = self
            .graph
            .weight("positions", &[text.context, width], &positions)?;
        let length = self
            .graph
            .node("Shape", &[&ids], &[int("start", 1), int("end", 2)]);
        let start = self.graph.integers("positions.start", &[0])?;
        let axis = self.graph.integers("positions.axis", &[0])?;
        let positions = self
            .graph
            .node("Slice", &[&positions, &start, &length, &axis], &[]);
        let trunk = self.graph.node("Add", &[&embedded, &positions], &[]);
        let flat = self.graph.integers("flat", &[-1, width as i64])?;
        let trunk = self.graph.node("Reshape", &[&trunk, &flat], &[]);
        let deep = self.graph.node("Shape", &[&embedded], &[]);
        // The end of text has the largest id of all tokens; the reference finds it so. CUDA's ArgMax
        // takes no integers, and would open more of cuDNN.
        let (largest, end) = (self.graph.fresh("largest"), self.graph.fresh("end"));
        let one = self.graph.integers("end.count", &[1])?;
        let outputs = vec![largest, end.clone()];
        let axis = [int("axis", 1)];
        self.graph.push("", "TopK", &[&ids, &one], outputs, &axis);
        let shapes = Shapes { flat, deep };
        let last = self.transformer_blocks(trunk, &shapes, &Row::At(end))?;
        self.project(&last, architecture.dimensions)
    }

    /// All blocks and the final normalisation over `trunk` `[batch · tokens, width]`; returns the
    /// one row of each sequence that is read, `[batch, width]`.
    fn transformer_blocks(
        &mut self,
        trunk: String,
        shapes: &Shapes,
        read: &Row,
    ) -> Result<String, CompileError> {
        let layers = self.transformer().layers;
        let norm = self.checkpoint.block_norm(self.tower, 0, ATTENTION_NORM)?;
        let normalised = self.normalise(&trunk, "0.attention.norm", &norm)?;
        let mut stream = Stream { trunk, normalised };
        for layer in 0..layers {
            let is_last = layer + 1 == layers;
            let read = is_last.then_some(read);
            let attended = self.attention(layer, &mut stream, shapes, read)?;
            let norm = self
                .checkpoint
                .block_norm(self.tower, layer, PERCEPTRON_NORM)?;
            let name = format!("{layer}.perceptron.norm");
            stream = self.add_and_normalise(attended, &stream.trunk, &name, &norm, true)?;
            let added = self.perceptron(layer, &stream.normalised)?;
            let (name, norm) = if is_last {
                ("after".to_owned(), self.checkpoint.norm_after(self.tower)?)
            } else {
                let next = layer + 1;
                let norm = self
                    .checkpoint
                    .block_norm(self.tower, next, ATTENTION_NORM)?;
                (format!("{next}.attention.norm"), norm)
            };
            stream = self.add_and_normalise(added, &stream.trunk, &name, &norm, !is_last)?;
            (self.progress)();
        }
        Ok(stream.normalised)
    }

    /// Self-attention with its output projection. In the last block, where only one row of each
    /// sequence is read afterwards, stream and result are narrowed to it.
    fn attention(
        &mut self,
        layer: usize,
        stream: &mut Stream,
        shapes: &Shapes,
        read: Option<&Row>,
    ) -> Result<Added, CompileError> {
        let Transformer { width, heads, .. } = self.transformer();
        let [query, key, value] = self.checkpoint.attention_in(self.tower, layer)?;
        let out = self
            .checkpoint
            .block_linear(self.tower, layer, ATTENTION_OUT, width, width)?;
        let out_bias = fold_value_bias(&out, &value.bias);

        let rows = stream.normalised.clone();
        let mut asking = rows.clone();
        let mut asking_shape = shapes.deep.clone();
        if let Some(Row::First) = read {
            asking = self.first_row(&asking, shapes)?;
            stream.trunk = self.first_row(&stream.trunk, shapes)?;
            asking_shape = self.graph.integers("row.deep", &[-1, 1, width as i64])?;
        }
        let name = |part: &str| format!("{layer}.{part}");
        let queries = self.linear(
            &asking,
            &name("query"),
            width,
            &query.weight,
            Some(&query.bias),
        )?;
        let keys = self.linear(&rows, &name("key"), width, &key.weight, None)?;
        let values = self.linear(&rows, &name("value"), width, &value.weight, None)?;
        let queries = self.graph.node("Reshape", &[&queries, &asking_shape], &[]);
        let keys = self.graph.node("Reshape", &[&keys, &shapes.deep], &[]);
        let values = self.graph.node("Reshape", &[&values, &shapes.deep], &[]);
        let mut settings = vec![int("num_heads", heads as i64)];
        if self.tower == Tower::Text {
            settings.push(int("unidirectional", 1));
        }
        let inputs = [queries.as_str(), &keys, &values];
        let mut mixed = self.graph.contrib("MultiHeadAttention", &inputs, &settings);
        if let Some(Row::At(index)) = read {
            let each = [int("batch_dims", 1)];
            mixed = self.graph.node("GatherND", &[&mixed, index], &each);
            let deep = self
                .graph
                .node("Reshape", &[&stream.trunk, &shapes.deep], &[]);
            stream.trunk = self.graph.node("GatherND", &[&deep, index], &each);
        }
        let mixed = self.graph.node("Reshape", &[&mixed, &shapes.flat], &[]);
        self.linear_to_add(&mixed, &name("out"), width, &out.weight, &out_bias)
    }

    /// The first row of each sequence of `value` `[batch · tokens, width]`.
    fn first_row(&mut self, value: &str, shapes: &Shapes) -> Result<String, CompileError> {
        let deep = self.graph.node("Reshape", &[value, &shapes.deep], &[]);
        let first = self.graph.index("row.first", 0)?;
        Ok(self
            .graph
            .node("Gather", &[&deep, &first], &[int("axis", 1)]))
    }

    fn perceptron(&mut self, layer: usize, input: &str) -> Result<Added, CompileError> {
        let Transformer {
            width,
            hidden,
            activation,
            ..
        } = self.transformer();
        let mut first =
            self.checkpoint
                .block_linear(self.tower, layer, PERCEPTRON_IN, hidden, width)?;
        let mut second =
            self.checkpoint
                .block_linear(self.tower, layer, PERCEPTRON_OUT, width, hidden)?;
        if activation == Activation::QuickGelu {
            for value in first.weight.iter_mut().chain(first.bias.iter_mut()) {
                *value *= QUICK_GELU;
            }
            for value in &mut second.weight {
                *value /= QUICK_GELU;
            }
        }
        let name = format!("{layer}.in");
        let sum = self.linear(input, &name, hidden, &first.weight, Some(&first.bias))?;
        let active = match activation {
            Activation::QuickGelu => {
                self.graph
                    .contrib("QuickGelu", &[&sum], &[float("alpha", 1.0)])
            }
            Activation::Gelu => self.graph.contrib("Gelu", &[&sum], &[]),
        };
        self.linear_to_add(
            &active,
            &format!("{layer}.back"),
            width,
            &second.weight,
            &second.bias,
        )
    }

    /// `input · weightᵀ + bias`, for an input of two dimensions and a weight `[out, in]` as stored.
    fn linear(
        &mut self,
        input: &str,
        name: &str,
        out: usize,
        weight: &[f32],
        bias: Option<&[f32]>,
    ) -> Result<String, CompileError> {
        let into = weight.len() / out;
        let weight = transpose(weight, out, into);
        if self.graph.precision() == Precision::Int8 {
            return self.linear_in_8_bits(input, name, out, &weight, bias);
        }
        let weight = self
            .graph
            .weight(&format!("{name}.weight"), &[into, out], &weight)?;
        let Some(bias) = bias else {
            return Ok(self.graph.node("MatMul", &[input, &weight], &[]));
        };
        let bias = self.graph.weight(&format!("{name}.bias"), &[out], bias)?;
        Ok(match self.graph.precision() {
            Precision::Fp32 | Precision::Int8 => {
                self.graph.node("Gemm", &[input, &weight, &bias], &[])
            }
            Precision::Fp16 => {
                let product = self.graph.node("MatMul", &[input, &weight], &[]);
                self.graph.node("Add", &[&product, &bias], &[])
            }
        })
    }

    /// `input · weight + bias` with 8-bit factors and 32-bit sums, for a weight `[in, out]`.
    fn linear_in_8_bits(
        &mut self,
        input: &str,
        name: &str,
        out: usize,
        weight: &[f32],
        bias: Option<&[f32]>,
    ) -> Result<String, CompileError> {
        let into = weight.len() / out;
        let stored = self
            .graph
            .quantized_weight(&format!("{name}.weight"), into, out, weight);
        let (weight, scale) = stored?;
        let mut inputs = vec![input.to_owned(), weight, scale];
        if let Some(bias) = bias {
            // An empty name leaves the zero point out.
            inputs.extend([
                String::new(),
                self.graph.weight(&format!("{name}.bias"), &[out], bias)?,
            ]);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        Ok(self.graph.contrib("DynamicQuantizeMatMul", &inputs, &[]))
    }

    /// Like [`Self::linear`], for a result that goes to [`Self::add_and_normalise`], which may take
    /// the bias upon itself.
    fn linear_to_add(
        &mut self,
        input: &str,
        name: &str,
        out: usize,
        weight: &[f32],
        bias: &[f32],
    ) -> Result<Added, CompileError> {
        match self.graph.precision() {
            Precision::Fp32 | Precision::Int8 => {
                let value = self.linear(input, name, out, weight, Some(bias))?;
                Ok(Added { value, bias: None })
            }
            Precision::Fp16 => {
                let value = self.linear(input, name, out, weight, None)?;
                let bias = self.graph.weight(&format!("{name}.bias"), &[out], bias)?;
                Ok(Added {
                    value,
                    bias: Some(bias),
                })
            }
        }
    }

    fn norm_weights(&mut self, name: &str, norm: &Norm) -> Result<(String, String), CompileError> {
        let shape = [norm.scale.len()];
        let scale = format!("{name}.scale");
        let scale = self.graph.weight(&scale, &shape, &norm.scale)?;
        let offset = format!("{name}.offset");
        Ok((scale, self.graph.weight(&offset, &shape, &norm.offset)?))
    }

    fn normalise(&mut self, input: &str, name: &str, norm: &Norm) -> Result<String, CompileError> {
        let (scale, offset) = self.norm_weights(name, norm)?;
        Ok(self.graph.node(
            "LayerNormalization",
            &[input, &scale, &offset],
            &[int("axis", -1), float("epsilon", NORM_EPSILON)],
        ))
    }

    /// The stream after a block's addition, and its normalisation.
    fn add_and_normalise(
        &mut self,
        added: Added,
        trunk: &str,
        name: &str,
        norm: &Norm,
        keep_sum: bool,
    ) -> Result<Stream, CompileError> {
        let Some(bias) = added.bias else {
            let trunk = self.graph.node("Add", &[&added.value, trunk], &[]);
            let normalised = self.normalise(&trunk, name, norm)?;
            return Ok(Stream { trunk, normalised });
        };
        let (scale, offset) = self.norm_weights(name, norm)?;
        let normalised = self.graph.fresh("skiplayernormalization");
        let sum = self.graph.fresh("sum");
        let mut outputs = vec![normalised.clone()];
        if keep_sum {
            // The two in between are the mean and the inverse deviation, which only training reads.
            outputs.extend([String::new(), String::new(), sum.clone()]);
        }
        self.graph.push(
            CONTRIB,
            "SkipLayerNormalization",
            &[&added.value, trunk, &scale, &offset, &bias],
            outputs,
            &[float("epsilon", NORM_EPSILON)],
        );
        Ok(Stream {
            trunk: sum,
            normalised,
        })
    }

    fn project(&mut self, row: &str, dimensions: usize) -> Result<(), CompileError> {
        let width = self.transformer().width;
        let projection = self.checkpoint.projection(self.tower)?;
        let projection = self
            .graph
            .weight("projection", &[width, dimensions], &projection)?;
        let shape = [Dim::Named("batch"), Dim::Fixed(dimensions)];
        match self.graph.precision() {
            Precision::Fp32 | Precision::Int8 => {
                self.graph.push(
                    "",
                    "MatMul",
                    &[row, &projection],
                    vec![OUTPUT.to_owned()],
                    &[],
                );
            }
            Precision::Fp16 => {
                let product = self.graph.node("MatMul", &[row, &projection], &[]);
                let to = [int("to", i64::from(element::FLOAT))];
                self.graph
                    .push("", "Cast", &[&product], vec![OUTPUT.to_owned()], &to);
            }
        }
        self.graph.output(OUTPUT, element::FLOAT, &shape);
        Ok(())
    }
}

/// Which row of each sequence the model's vector is read from.
enum Row {
    /// The first, in every sequence.
    First,
    /// The one whose index this value `[batch, 1]` holds.
    At(String),
}

/// The names of the two shapes between which values go back and forth.
struct Shapes {
    /// `[batch · tokens, width]`, for products and normalisation.
    flat: String,
    /// `[batch, tokens, width]`, for attention.
    deep: String,
}

/// What a block adds to the stream.
struct Added {
    value: String,
    /// Where it is still to be added to the value.
    bias: Option<String>,
}

/// Weights, bias, and the centre that is subtracted from the pixels.
type PatchWeights = (Vec<f32>, Vec<f32>, Option<[f32; 3]>);

/// What pixels are divided by in 16-bit graphs, so that their weights, otherwise near the smallest
/// normal 16-bit number, keep their precision. A power of two: the division is exact.
const HALF_PIXEL_SCALE: f64 = 128.0;

/// The output projection's bias after the values' bias has passed through it.
fn fold_value_bias(out: &Linear, value_bias: &[f32]) -> Vec<f32> {
    out.weight
        .chunks_exact(value_bias.len())
        .zip(&out.bias)
        .map(|(row, &bias)| {
            let carried: f64 = row
                .iter()
                .zip(value_bias)
                .map(|(&weight, &value)| f64::from(weight) * f64::from(value))
                .sum();
            (f64::from(bias) + carried) as f32
        })
        .collect()
}
