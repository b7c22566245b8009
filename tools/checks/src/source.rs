//! What the programs' sources read from the environment, call on AWS and
//! report as metrics.
//!
//! A lexer, not a compiler: comments and test modules are taken out, then
//! method calls and string literals are looked for. It is exact about the
//! forms this project uses and reports what it cannot follow, so that nothing
//! slips by.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// A program that the template deploys.
pub struct Program {
    /// Name of its package.
    pub name: &'static str,
    /// Folders with its own sources.
    own: &'static [&'static str],
    /// Folders of library crates that it runs.
    shared: &'static [&'static str],
    /// Files in those folders that it never runs.
    never_run: &'static [&'static str],
}

/// The three programs.
pub const PROGRAMS: &[Program] = &[
    Program {
        name: "intake",
        own: &["functions/intake/src"],
        shared: &["lib/delivery/src", "events/src", "lib/platform/src"],
        never_run: &[],
    },
    Program {
        name: "scaler",
        own: &["functions/scaler/src"],
        shared: &["lib/platform/src"],
        never_run: &[],
    },
    Program {
        name: "gpu-task",
        own: &["gpu-task/src"],
        shared: &[
            "lib/delivery/src",
            "events/src",
            "lib/platform/src",
            "lib/model/src",
            "lib/image/src",
        ],
        // `clip-model` the command downloads weights from the model hub; the
        // task only opens the bundle that it made.
        never_run: &["lib/model/src/main.rs", "lib/model/src/fetch.rs"],
    },
];

/// What one program does, as its sources say.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Environment variables that it reads.
    pub variables: BTreeSet<String>,
    /// SDK operations that it calls, in snake case.
    pub operations: BTreeSet<String>,
    /// Calls that are sent, but whose operation cannot be told.
    pub unknown_calls: Vec<String>,
    /// All string literals: names of metrics and dimensions are among them.
    pub literals: BTreeSet<String>,
}

/// The facts of all programs, by name.
#[derive(Clone, Default)]
pub struct Programs(pub BTreeMap<&'static str, Facts>);

impl Programs {
    /// Reads the sources below `root`.
    pub fn read(root: &Path) -> anyhow::Result<Self> {
        let mut programs = BTreeMap::new();
        for program in PROGRAMS {
            let own = read_folders(root, program.own, program.never_run)?;
            let shared = read_folders(root, program.shared, program.never_run)?;
            programs.insert(program.name, facts(&own, &shared));
        }
        Ok(Self(programs))
    }

    /// The facts of one program.
    pub fn of(&self, name: &str) -> Facts {
        self.0.get(name).cloned().unwrap_or_default()
    }
}

fn read_folders(root: &Path, folders: &[&str], never_run: &[&str]) -> anyhow::Result<Vec<String>> {
    let mut texts = Vec::new();
    for folder in folders {
        let mut waiting = vec![root.join(folder)];
        while let Some(path) = waiting.pop() {
            let entries = fs::read_dir(&path)
                .with_context(|| format!("{} cannot be read", path.display()))?;
            let mut paths: Vec<PathBuf> =
                entries.filter_map(Result::ok).map(|e| e.path()).collect();
            paths.sort();
            for path in paths {
                let is_never_run = never_run.iter().any(|file| path == root.join(file));
                if path.is_dir() {
                    waiting.push(path);
                } else if path.extension().is_some_and(|kind| kind == "rs") && !is_never_run {
                    texts.push(fs::read_to_string(&path)?);
                }
            }
        }
    }
    Ok(texts)
}

/// The facts of a program of `own` files that uses `shared` ones. A public
/// function of a shared file counts only if code that counts names it.
fn facts(own: &[String], shared: &[String]) -> Facts {
    let code = |text: &String| without_imports(&without_tests(&without_comments(text)));
    let own: Vec<String> = own.iter().map(code).collect();
    let shared: Vec<String> = shared.iter().map(code).collect();
    let mut names: BTreeSet<String> = own.iter().flat_map(|text| identifiers(text)).collect();
    let reached = loop {
        let reached: Vec<String> = shared
            .iter()
            .map(|text| without_unused_functions(text, &names))
            .collect();
        let before = names.len();
        names.extend(reached.iter().flat_map(|text| identifiers(text)));
        if names.len() == before {
            break reached;
        }
    };
    let all: Vec<String> = own.into_iter().chain(reached).collect();
    let constants: BTreeMap<String, String> = all.iter().flat_map(|text| constants(text)).collect();
    let mut facts = Facts::default();
    for text in &all {
        facts.variables.extend(variables(text, &constants));
        facts.literals.extend(literals(text));
        let (operations, unknown) = operations(text);
        facts.operations.extend(operations);
        facts.unknown_calls.extend(unknown);
    }
    facts
}

/// Blanks comments; string literals stay as they are.
fn without_comments(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut kept = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"//") {
            while at < bytes.len() && bytes[at] != b'\n' {
                at += 1;
            }
        } else if bytes[at..].starts_with(b"/*") {
            let end = text[at..]
                .find("*/")
                .map_or(bytes.len(), |end| at + end + 2);
            at = end;
        } else {
            let end = literal_end(bytes, at).unwrap_or(at + 1);
            kept.extend_from_slice(&bytes[at..end]);
            at = end;
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// Where a string or character literal that starts at `at` ends.
fn literal_end(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    if rest[0] == b'r' && (at == 0 || !is_name(bytes[at - 1])) {
        let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
        if rest.get(1 + hashes) != Some(&b'"') {
            return None;
        }
        let mut close = vec![b'"'];
        close.extend(std::iter::repeat_n(b'#', hashes));
        let body = 2 + hashes;
        let length = rest[body..]
            .windows(close.len())
            .position(|window| window == close)?;
        return Some(at + body + length + close.len());
    }
    if rest[0] == b'\'' {
        // A character, not a lifetime.
        let is_character = matches!(rest, [b'\'', b'\\', ..]) || rest.get(2) == Some(&b'\'');
        if !is_character {
            return None;
        }
        let skip = if rest[1] == b'\\' { 3 } else { 2 };
        let end = rest[skip..].iter().position(|byte| *byte == b'\'')?;
        return Some(at + skip + end + 1);
    }
    if rest[0] != b'"' {
        return None;
    }
    let mut end = 1;
    while end < rest.len() && rest[end] != b'"' {
        end += if rest[end] == b'\\' { 2 } else { 1 };
    }
    Some((at + end + 1).min(bytes.len()))
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Takes out every item under `#[cfg(test)]`.
fn without_tests(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..start]);
        let after = &rest[start..];
        rest = &after[block_end(after)..];
    }
    kept.push_str(rest);
    kept
}

/// Takes out `use` declarations: to import a function is not to call it.
fn without_imports(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("use ") {
        let line = rest[..at].rsplit('\n').next().unwrap_or_default().trim();
        let is_declaration = line.is_empty() || line.starts_with("pub");
        if is_declaration {
            kept.push_str(&rest[..at]);
            rest = rest[at..].split_once(';').map_or("", |(_, after)| after);
        } else {
            kept.push_str(&rest[..at + "use ".len()]);
            rest = &rest[at + "use ".len()..];
        }
    }
    kept.push_str(rest);
    kept
}

/// Where the first block in `text` ends, or the first `;` before any block.
fn block_end(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut depth = 0_usize;
    let mut at = 0;
    while at < bytes.len() {
        if let Some(end) = literal_end(bytes, at) {
            at = end;
            continue;
        }
        match bytes[at] {
            b'{' => depth += 1,
            b'}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return at + 1;
                }
            }
            b';' if depth == 0 => return at + 1,
            _ => {}
        }
        at += 1;
    }
    bytes.len()
}

/// Takes out public functions at the file's top level that are not in `used`.
fn without_unused_functions(text: &str, used: &BTreeSet<String>) -> String {
    let mut kept = String::new();
    let mut rest = text;
    loop {
        let next = ["\npub async fn ", "\npub fn "]
            .iter()
            .filter_map(|start| rest.find(start).map(|at| (at, start.len())))
            .min();
        let Some((at, length)) = next else {
            kept.push_str(rest);
            return kept;
        };
        let (before, function) = rest.split_at(at);
        kept.push_str(before);
        let name: String = function[length..]
            .bytes()
            .take_while(|byte| is_name(*byte))
            .map(char::from)
            .collect();
        let end = block_end(function);
        if used.contains(&name) {
            kept.push_str(&function[..end]);
        }
        rest = &function[end..];
    }
}

fn identifiers(text: &str) -> Vec<String> {
    text.split(|character: char| !character.is_ascii_alphanumeric() && character != '_')
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// `const NAME: &str = "value";`
fn constants(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("const ") {
        let rest = &text[at + "const ".len()..];
        let Some((name, rest)) = rest.split_once(": &str = \"") else {
            continue;
        };
        if !name.bytes().all(is_name) {
            continue;
        }
        if let Some((value, _)) = rest.split_once('"') {
            found.push((name.to_owned(), value.to_owned()));
        }
    }
    found
}

/// How a variable is read: `platform::env::Reader`'s methods and the standard
/// library's functions.
const READERS: &[&str] = &[
    ".optional(",
    ".required(",
    ".parsed(",
    ".within(",
    ".seconds(",
    ".flag(",
    ".choice(",
    "env::var(",
    "env::var_os(",
    // A helper that is handed the reader: `queue_url(env, "INPUT_QUEUE_URL")`.
    "(env, ",
];

/// Read by `tracing_subscriber`'s `EnvFilter::try_from_default_env`.
const LOG_FILTER_CALL: &str = "EnvFilter::try_from_default_env(";

fn variables(text: &str, constants: &BTreeMap<String, String>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for reader in READERS {
        for (at, _) in text.match_indices(reader) {
            let argument = text[at + reader.len()..].trim_start();
            let name = match argument.strip_prefix('"') {
                Some(literal) => literal.split('"').next().map(str::to_owned),
                None => identifiers(argument.split([',', ')']).next().unwrap_or_default())
                    .last()
                    .and_then(|constant| constants.get(constant).cloned()),
            };
            found.extend(name.filter(|name| is_variable(name)));
        }
    }
    if text.contains(LOG_FILTER_CALL) {
        found.insert("RUST_LOG".to_owned());
    }
    found
}

fn is_variable(name: &str) -> bool {
    let all_capitals =
        |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    name.starts_with(|first: char| first.is_ascii_uppercase()) && name.bytes().all(all_capitals)
}

fn literals(text: &str) -> BTreeSet<String> {
    let bytes = text.as_bytes();
    let mut found = BTreeSet::new();
    let mut at = 0;
    while at < bytes.len() {
        match literal_end(bytes, at) {
            Some(end) => {
                if bytes[at] == b'"' {
                    found.insert(text[at + 1..end - 1].to_owned());
                }
                at = end;
            }
            None => at += 1,
        }
    }
    found
}

/// How a request of the SDK goes out.
const SENDS: &[&str] = &[".send()", ".into_paginator()"];

/// The operations whose requests are sent in `text`, and the sends whose
/// operation cannot be told.
fn operations(text: &str) -> (BTreeSet<String>, Vec<String>) {
    let mut found = BTreeSet::new();
    let mut unknown = Vec::new();
    for send in SENDS {
        for (at, _) in text.match_indices(send) {
            let statement = statement_before(text, at);
            match operation_of(statement).or_else(|| operation_of_variable(text, at, statement)) {
                Some(operation) => {
                    found.insert(operation);
                }
                // `.into_paginator().send()`: counted at the paginator.
                None if statement.trim_end().ends_with(".into_paginator()") => {}
                None => unknown.push(format!("{}{send}", statement.trim())),
            }
        }
    }
    (found, unknown)
}

/// The expression that `at` ends, back to where its statement begins.
fn statement_before(text: &str, at: usize) -> &str {
    let bytes = text.as_bytes();
    let mut depth = 0_i32;
    let mut start = at;
    while start > 0 {
        match bytes[start - 1] {
            // A block that ended before the statement began.
            b'}' if depth == 0 => break,
            b')' | b']' | b'}' => depth += 1,
            b'(' | b'[' | b'{' if depth == 0 => break,
            b'(' | b'[' | b'{' => depth -= 1,
            b';' | b',' if depth == 0 => break,
            _ => {}
        }
        start -= 1;
    }
    &text[start..at]
}

/// What a `let` binds, or the statement itself.
fn right_side(statement: &str) -> &str {
    let is_binding = statement.trim_start().starts_with("let ");
    match statement.split_once(" = ") {
        Some((_, right)) if is_binding => right,
        _ => statement,
    }
}

/// The first method without arguments in a chain: `client.get_object()…`.
fn operation_of(statement: &str) -> Option<String> {
    let expression = right_side(statement);
    let bytes = expression.as_bytes();
    let mut depth = 0_i32;
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            b'.' if depth == 0 => {
                let name: String = bytes[at + 1..]
                    .iter()
                    .take_while(|byte| is_name(**byte))
                    .map(|byte| char::from(*byte))
                    .collect();
                let is_empty_call = expression[at + 1 + name.len()..].starts_with("()");
                let is_conversion = ["clone", "client", "await", "as_ref"].contains(&name.as_str());
                if is_empty_call && !name.is_empty() && !is_conversion {
                    return Some(name).filter(|name| name != "into_paginator");
                }
            }
            _ => {}
        }
    }
    None
}

/// `let request = client.run_task()…; … request.send()`, or the same with
/// `mut` and later assignments.
fn operation_of_variable(text: &str, at: usize, statement: &str) -> Option<String> {
    let keywords = ["match", "return", "if", "let", "while"];
    let receiver = identifiers(right_side(statement));
    let name = receiver
        .iter()
        .find(|word| !keywords.contains(&word.as_str()))?;
    [format!("let {name} = "), format!("let mut {name} = ")]
        .iter()
        .filter_map(|binding| {
            text[..at]
                .rfind(binding.as_str())
                .map(|from| from + binding.len())
        })
        .max()
        .and_then(|from| operation_of(text[from..at].split(';').next().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(own: &str, shared: &str) -> Facts {
        facts(&[own.to_owned()], &[shared.to_owned()])
    }

    #[test]
    fn variables_are_found_by_literal_and_by_constant() {
        let found = of(
            r#"
            const LIBRARY: &str = "ORT_DYLIB_PATH";
            fn read(env: &Reader) {
                env.required("INPUT_QUEUE_URL", "the URL");
                env.within(
                    "BATCH_SIZE", 8, 1..=256, "images");
                let path = std::env::var_os(LIBRARY);
                let dead = queue_url(env, "DEAD_LETTER_QUEUE_URL");
                // env.optional("IN_A_COMMENT")
                let greeting = "env.optional";
            }
            #[cfg(test)]
            mod tests { fn t() { env.optional("IN_A_TEST"); } }
            "#,
            "pub fn logs() { EnvFilter::try_from_default_env(); }",
        );
        let names: Vec<&str> = found.variables.iter().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "BATCH_SIZE",
                "DEAD_LETTER_QUEUE_URL",
                "INPUT_QUEUE_URL",
                "ORT_DYLIB_PATH",
                "RUST_LOG"
            ]
        );
    }

    #[test]
    fn operations_are_found_in_chains_and_variables() {
        let found = of(
            r#"
            async fn act(&self) {
                let output = self.s3.get_object().bucket("b").send().await;
                let request = self.ecs.run_task().count(n.into());
                let answer = request.client_token("x").send().await;
                let mut call = client.delete_message_batch();
                for entry in entries.iter() {
                    call = call.entries(entry);
                }
                let answer = call.send().await;
                let pages = s3.list_objects_v2().prefix(p(1)).into_paginator().send();
                channel.send(value).await;
            }
            "#,
            "",
        );
        let names: Vec<&str> = found.operations.iter().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "delete_message_batch",
                "get_object",
                "list_objects_v2",
                "run_task"
            ]
        );
        assert_eq!(found.unknown_calls, Vec::<String>::new());
    }

    #[test]
    fn a_call_that_cannot_be_followed_is_reported() {
        let found = of("fn f(request: R) { request.send(); }", "");
        assert_eq!(found.unknown_calls, ["request.send()"]);
    }

    #[test]
    fn a_function_that_a_used_one_calls_counts_and_an_import_does_not() {
        let shared = r#"
pub use other::{unused, used};

pub fn used() { helper(); }

pub fn helper() { s3.get_object().range(format!("bytes=0-{}", 1)).send().await; }

pub fn unused() { s3.delete_object().send().await; }
"#;
        let found = of("use shared::used;\nfn f() { used(); }", shared);
        let names: Vec<&str> = found.operations.iter().map(String::as_str).collect();
        assert_eq!(names, ["get_object"]);
    }

    #[test]
    fn an_unused_function_of_a_shared_crate_does_not_count() {
        let shared = r#"
pub async fn put_vector() { s3.put_object().send().await; }

pub async fn delete_vectors() { s3.delete_object().send().await; }
"#;
        let found = of("fn f() { delivery::put_vector(); }", shared);
        let names: Vec<&str> = found.operations.iter().map(String::as_str).collect();
        assert_eq!(names, ["put_object"]);
    }
}
