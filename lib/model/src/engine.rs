//! Runs a bundle's graphs with ONNX Runtime, which is loaded from the library that
//! `ORT_DYLIB_PATH` names.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::ValueEnum;
use ort::environment::Environment;
use ort::ep;
use ort::logging::LogLevel;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{Tensor, TensorRef};
use thiserror::Error;

use crate::bundle::{Bundle, TEXT_GRAPH, VISION_GRAPH};
use crate::cuda::{self, Held};
use crate::precision::Precision;
use crate::tokenizer::Tokens;
use crate::towers::{OUTPUT, TEXT_INPUT, VISION_INPUT};
use crate::widen::widen;

/// The environment variable that names ONNX Runtime's library.
pub const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

/// Turns ONNX Runtime's telemetry off when it is 1.
const TELEMETRY_VARIABLE: &str = "ORT_DISABLE_TELEMETRY";

/// Why a model cannot be loaded or run.
#[allow(missing_docs)] // The messages say it.
#[derive(Debug, Error)]
pub enum EngineError {
    #[error(
        "{LIBRARY_VARIABLE} is not set; point it at ONNX Runtime's shared library \
         (libonnxruntime.so of the Python package onnxruntime, or onnxruntime-gpu for CUDA)"
    )]
    NoLibrary,
    #[error("cannot load ONNX Runtime from {LIBRARY_VARIABLE}={}: {reason}", path.display())]
    Library { path: PathBuf, reason: String },
    #[error(
        "EXECUTION_PROVIDER=cuda cannot be used: {reason}; it needs an NVIDIA driver, the CUDA \
         libraries, and {LIBRARY_VARIABLE} pointing at the library of onnxruntime-gpu with \
         libonnxruntime_providers_cuda.so beside it"
    )]
    Cuda { reason: String },
    #[error("cannot load the graph {}: {reason}", path.display())]
    Load { path: PathBuf, reason: String },
    #[error(
        "this bundle is built with `--precision int8`, which {reason}; use one in fp32 or fp16"
    )]
    EightBits { reason: &'static str },
    #[error("{found} values given for {what}, wanted {wanted}")]
    Input {
        what: String,
        found: usize,
        wanted: usize,
    },
    #[error("ONNX Runtime failed: {reason}")]
    Run { reason: String },
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ExecutionProvider {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU. That it cannot be had is an error, never a reason to use the processor.
    Cuda,
}

/// How a model is run.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// What computes.
    pub provider: ExecutionProvider,
    /// Threads that share one operator; all cores that this process may use unless set. No effect
    /// on CUDA.
    pub intra_threads: Option<usize>,
    /// Whether those threads wait for work by spinning (ONNX Runtime's default). It saves
    /// microseconds between operators and costs a core that others, such as decoders, could use.
    pub spinning: bool,
    /// Images or texts in one run at most; a larger batch is cut. Bounds the memory of
    /// activations.
    pub max_batch: usize,
    /// Whether a processor computes in 32 bits with weights that are stored in 16; otherwise it
    /// computes in 16, as a GPU does, only slowly. No effect on CUDA.
    pub widen: bool,
}

/// Images in one run unless asked otherwise. On a CPU larger runs are no faster and hold more
/// memory; on a GPU this fills a T4.
pub const DEFAULT_MAX_BATCH: usize = 32;

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            provider: ExecutionProvider::Cpu,
            intra_threads: None,
            spinning: true,
            max_batch: DEFAULT_MAX_BATCH,
            widen: true,
        }
    }
}

/// Memory that the model reads pixels from fastest, zero at first: pinned where CUDA computes, so
/// that they go to the device without another copy. Made once and filled again and again.
pub struct PixelBuffer {
    tensor: Held<Tensor<u8>>,
    bytes: usize,
}

impl Deref for PixelBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the tensor has `bytes` bytes in memory that the processor can read, all set when
        // it was made, and nobody else has them while this borrow lasts.
        unsafe { std::slice::from_raw_parts(self.tensor.data_ptr().cast(), self.bytes) }
    }
}

impl DerefMut for PixelBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr_mut().cast(), self.bytes) }
    }
}

/// The vision tower, ready to run.
pub struct VisionEngine {
    session: Held<Session>,
    provider: ExecutionProvider,
    dimensions: usize,
    image_size: usize,
    max_batch: usize,
}

impl VisionEngine {
    /// Loads the vision graph of a bundle.
    pub fn load(bundle: &Bundle, options: &EngineOptions) -> Result<VisionEngine, EngineError> {
        let manifest = bundle.manifest();
        let max_batch = match manifest.precision {
            Precision::Fp32 | Precision::Fp16 => options.max_batch.max(1),
            Precision::Int8 => {
                check_for_8_bits(options.provider)?;
                // Activations share one scale per run: alone in its run, an image's vector does
                // not depend on its company.
                1
            }
        };
        if options.provider == ExecutionProvider::Cuda && manifest.precision == Precision::Fp32 {
            tracing::warn!(
                model = manifest.model,
                "this bundle is fp32, which takes four to five times as long as fp16 on a T4; build it \
                 with `clip-model build --precision fp16`"
            );
        }
        let path = bundle.file(VISION_GRAPH);
        let is_cpu = options.provider == ExecutionProvider::Cpu;
        let session = if is_cpu && options.widen && manifest.precision == Precision::Fp16 {
            load_widened(&path, options)?
        } else {
            load(&path, options)?
        };
        if manifest.is_synthesized() {
            tracing::warn!(model = manifest.model, weights = %manifest.weights, "synthesized weights");
        }
        Ok(VisionEngine {
            session: Held::new(session),
            provider: options.provider,
            dimensions: manifest.dimensions,
            image_size: manifest.image_size,
            max_batch,
        })
    }

    /// Length of the vectors.
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// Side of the images in pixels.
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// Images in one run at most.
    pub fn max_batch(&self) -> usize {
        self.max_batch
    }

    /// Bytes of one image.
    pub fn image_bytes(&self) -> usize {
        self.image_size * self.image_size * 3
    }

    /// Runs once on grey images, so that the first real ones do not pay for memory and, on CUDA, for
    /// loading kernels: on a CPU one image, on CUDA a full batch, whose memory is what takes time.
    pub fn warm_up(&mut self) -> Result<(), EngineError> {
        let images = match self.provider {
            ExecutionProvider::Cpu => 1,
            ExecutionProvider::Cuda => self.max_batch,
        };
        let grey = vec![127; images * self.image_bytes()];
        self.embed(&grey, images).map(|_| ())
    }

    /// Memory for the pixels of a batch. Where none can be pinned, any will do: it is slower to copy.
    pub fn buffer(&self, bytes: usize) -> Result<PixelBuffer, EngineError> {
        let pinned = match self.provider {
            ExecutionProvider::Cpu => None,
            ExecutionProvider::Cuda => self
                .pinned(bytes)
                .inspect_err(|error| tracing::warn!(bytes, %error, "cannot pin memory"))
                .ok(),
        };
        let mut tensor = match pinned {
            Some(tensor) => tensor,
            None => Tensor::<u8>::new(&Allocator::default(), [bytes]).map_err(failed)?,
        };
        // SAFETY: the tensor has `bytes` bytes in memory that the processor can write.
        unsafe { tensor.data_ptr_mut().cast::<u8>().write_bytes(0, bytes) };
        Ok(PixelBuffer {
            tensor: Held::new(tensor),
            bytes,
        })
    }

    fn pinned(&self, bytes: usize) -> ort::Result<Tensor<u8>> {
        let pinned = MemoryInfo::new(
            AllocationDevice::CUDA_PINNED,
            0,
            AllocatorType::Device,
            MemoryType::CPUInput,
        )?;
        Tensor::new(&Allocator::new(&self.session, pinned)?, [bytes])
    }

    /// Embeds `batch` images, `batch × size × size × 3` bytes of RGB; returns `batch × dimensions`
    /// values, not normalised.
    pub fn embed(&mut self, pixels: &[u8], batch: usize) -> Result<Vec<f32>, EngineError> {
        let image = self.image_bytes();
        if pixels.len() != batch * image {
            return Err(EngineError::Input {
                what: format!("{batch} images of {0}×{0} RGB pixels", self.image_size),
                found: pixels.len(),
                wanted: batch * image,
            });
        }
        let mut embeddings = Vec::with_capacity(batch * self.dimensions);
        for part in pixels.chunks(self.max_batch * image) {
            let shape = [part.len() / image, self.image_size, self.image_size, 3];
            let input = TensorRef::from_array_view((shape, part)).map_err(failed)?;
            let outputs = self
                .session
                .run(ort::inputs![VISION_INPUT => input])
                .inspect_err(|_| {
                    if self.provider == ExecutionProvider::Cuda {
                        cuda::has_failed();
                    }
                })
                .map_err(failed)?;
            let (_, values) = outputs[OUTPUT]
                .try_extract_tensor::<f32>()
                .map_err(failed)?;
            embeddings.extend_from_slice(values);
        }
        Ok(embeddings)
    }
}

/// The text tower, ready to run.
pub struct TextEngine {
    session: Session,
    dimensions: usize,
    max_batch: usize,
}

impl TextEngine {
    /// Loads the text graph of a bundle.
    pub fn load(bundle: &Bundle, options: &EngineOptions) -> Result<TextEngine, EngineError> {
        TextEngine::load_graph(
            &bundle.file(TEXT_GRAPH),
            bundle.manifest().dimensions,
            options,
        )
    }

    /// Loads a text graph that is not in a bundle yet.
    pub(crate) fn load_graph(
        path: &Path,
        dimensions: usize,
        options: &EngineOptions,
    ) -> Result<TextEngine, EngineError> {
        let session = load(path, options)?;
        Ok(TextEngine {
            session,
            dimensions,
            max_batch: options.max_batch.max(1),
        })
    }

    /// Length of the vectors.
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// Embeds tokenised texts; returns `texts × dimensions` values, not normalised.
    pub fn embed(&mut self, tokens: &Tokens) -> Result<Vec<f32>, EngineError> {
        if tokens.length == 0 {
            return Ok(Vec::new());
        }
        let mut embeddings = Vec::new();
        for part in tokens.ids.chunks(self.max_batch * tokens.length) {
            let shape = [part.len() / tokens.length, tokens.length];
            let input = TensorRef::from_array_view((shape, part)).map_err(failed)?;
            let outputs = self
                .session
                .run(ort::inputs![TEXT_INPUT => input])
                .map_err(failed)?;
            let (_, values) = outputs[OUTPUT]
                .try_extract_tensor::<f32>()
                .map_err(failed)?;
            embeddings.extend_from_slice(values);
        }
        Ok(embeddings)
    }
}

/// Turns ONNX Runtime's telemetry off, unless the user has set the variable.
/// Loading the library starts it already, with a file beside the temporary ones
/// and a thread that uploads, so [`environment`]'s own setting comes too late.
///
/// # Safety
///
/// To be called before the process has a second thread.
pub unsafe fn disable_telemetry() {
    if std::env::var_os(TELEMETRY_VARIABLE).is_none() {
        // SAFETY: the caller's: no other thread reads the environment.
        unsafe { std::env::set_var(TELEMETRY_VARIABLE, "1") };
    }
}

/// Loads ONNX Runtime, once per process.
pub fn environment() -> Result<&'static Environment, EngineError> {
    // Kept for the process's life: ONNX Runtime allows one environment.
    static LOADED: OnceLock<Result<Environment, (PathBuf, String)>> = OnceLock::new();
    let Some(path) = std::env::var_os(LIBRARY_VARIABLE).filter(|value| !value.is_empty()) else {
        return Err(EngineError::NoLibrary);
    };
    let loaded = LOADED.get_or_init(|| {
        let path = PathBuf::from(path);
        if !path.is_file() {
            return Err((path, "no such file".to_owned()));
        }
        let builder = match ort::init_from(&path) {
            Ok(builder) => builder,
            Err(error) => return Err((path, error.to_string())),
        };
        let environment = builder
            .with_name("clip-model")
            .with_telemetry(false)
            .build()
            .map_err(|error| (path, error.to_string()))?;
        // Below warnings ONNX Runtime tells what its optimiser does with every node.
        environment.set_log_level(LogLevel::Warning);
        Ok(environment)
    });
    loaded
        .as_ref()
        .map_err(|(path, reason)| EngineError::Library {
            path: path.clone(),
            reason: reason.clone(),
        })
}

pub(crate) fn load(path: &Path, options: &EngineOptions) -> Result<Session, EngineError> {
    let environment = environment()?;
    let unloadable = |reason| unloadable(path, reason);
    if !path.is_file() {
        return Err(unloadable("no such file".to_owned()));
    }
    let builder = Session::builder(environment).map_err(|error| unloadable(error.to_string()))?;
    let builder = configure(builder, options).map_err(|error| unloadable(error.to_string()))?;
    let mut builder = match options.provider {
        ExecutionProvider::Cpu => builder,
        ExecutionProvider::Cuda => {
            cuda::prepare().map_err(|error| EngineError::Cuda {
                reason: error.to_string(),
            })?;
            builder
                .with_execution_providers([ep::CUDA::default()
                    // Sums of the fused normalisation in 32 bits, whatever the weights are.
                    .with_skip_layer_norm_strict_mode(true)
                    .build()
                    .error_on_failure()])
                .map_err(|error| EngineError::Cuda {
                    reason: error.to_string().trim_end_matches('.').to_owned(),
                })?
        }
    };
    builder
        .commit_from_file(path)
        .map_err(|error| unloadable(error.to_string()))
}

/// Loads a graph in 16 bits to be computed in 32.
fn load_widened(path: &Path, options: &EngineOptions) -> Result<Session, EngineError> {
    let environment = environment()?;
    let graph = widen(path).map_err(|error| unloadable(path, error.to_string()))?;
    Session::builder(environment)
        .and_then(|builder| configure(builder, options))
        .and_then(|builder| {
            Ok(builder.with_external_initializer_file_in_memory(&graph.data_name, graph.data)?)
        })
        .and_then(|mut builder| builder.commit_from_memory(&graph.graph))
        .map_err(|error| unloadable(path, error.to_string()))
}

fn unloadable(path: &Path, reason: String) -> EngineError {
    EngineError::Load {
        path: path.to_owned(),
        reason,
    }
}

/// Whether 8-bit products can be had, and are right.
fn check_for_8_bits(provider: ExecutionProvider) -> Result<(), EngineError> {
    if provider == ExecutionProvider::Cuda {
        return Err(EngineError::EightBits {
            reason: "ONNX Runtime does not run on CUDA",
        });
    }
    // Older x86 sums pairs of products in 16 bits, which saturate.
    #[cfg(target_arch = "x86_64")]
    if !std::arch::is_x86_feature_detected!("avx512vnni")
        && !std::arch::is_x86_feature_detected!("avxvnni")
    {
        return Err(EngineError::EightBits {
            reason: "needs a processor with VNNI",
        });
    }
    Ok(())
}

fn configure(builder: SessionBuilder, options: &EngineOptions) -> ort::Result<SessionBuilder> {
    let threads = options
        .intra_threads
        .or_else(|| std::thread::available_parallelism().ok().map(Into::into))
        .unwrap_or(1);
    let builder = builder
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_intra_threads(threads)?
        .with_log_level(LogLevel::Warning)?
        .with_intra_op_spinning(options.spinning)?;
    Ok(match options.provider {
        // Scalar code on CPUs, five times as slow as the two operators that it would replace.
        ExecutionProvider::Cpu => builder.with_disabled_optimizers("SkipLayerNormFusion")?,
        ExecutionProvider::Cuda => {
            // A plan of memory would be kept for each size of batch that ever came.
            let builder = builder.with_memory_pattern(false)?;
            // A node that CUDA lacks is an error.
            builder.with_disable_cpu_fallback()?
        }
    })
}

pub(crate) fn failed<R>(error: ort::Error<R>) -> EngineError {
    EngineError::Run {
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_may_move_to_the_thread_that_runs_them() {
        fn movable<T: Send>() {}
        movable::<VisionEngine>();
        movable::<PixelBuffer>();
        movable::<TextEngine>();
    }

    #[test]
    fn providers_are_read_as_they_are_written() {
        let read = |name| ExecutionProvider::from_str(name, false);
        assert_eq!(read("cpu"), Ok(ExecutionProvider::Cpu));
        assert_eq!(read("cuda"), Ok(ExecutionProvider::Cuda));
        assert!(read("gpu").is_err());
    }
}
