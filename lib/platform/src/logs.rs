//! Structured logs: JSON lines where a machine reads them, text for a person.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format::debug_fn;

/// Starts logging for the program. `RUST_LOG` filters (default `info`, and of
/// ONNX Runtime warnings only, which tells of every optimisation otherwise),
/// `LOG_FORMAT=json|text` chooses the form; without it a terminal gets text
/// and everything else (CloudWatch Logs, files) gets one JSON object a line.
///
/// Log lines go to standard error; standard output belongs to the metrics,
/// which CloudWatch only recognises when a line is nothing but their JSON.
pub fn init_logs(program: &'static str) {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,ort=warn"));
    let wants_text = match std::env::var("LOG_FORMAT").as_deref() {
        Ok("text") => true,
        Ok("json") => false,
        _ => std::io::stderr().is_terminal(),
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A second call (two tests in one process) keeps the first subscriber.
    let _ = if wants_text {
        // Fields quote what others wrote: keys, events, answers.
        let fields = debug_fn(|writer, field, value| match field.name() {
            "message" => write!(writer, "{}", harmless(&format!("{value:?}"))),
            name => write!(writer, "{name}={}", harmless(&format!("{value:?}"))),
        });
        let fields = fields.delimited(" ");
        subscriber.with_target(false).fmt_fields(fields).try_init()
    } else {
        subscriber
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .try_init()
    };
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!(program, %panic, "panicked");
    }));
}

/// A terminal obeys control characters; a line break alone does no harm.
fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() && character != '\n' {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}
