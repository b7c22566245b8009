//! What the programs' sources read from the environment, call on AWS and
//! report as metrics, found in their tokens.
//!
//! It is exact about the forms this project uses and reports what it cannot
//! follow, so that nothing slips by.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, anyhow};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

pub struct Program {
    pub name: &'static str,
    own: &'static [&'static str],
    shared: &'static [&'static str],
    /// Files in those folders that it never runs.
    never_run: &'static [&'static str],
}

/// What the worker is made of, with a GPU or without.
const WORKER: &[&str] = &[
    "lib/worker/src",
    "lib/delivery/src",
    "events/src",
    "lib/platform/src",
    "lib/model/src",
    "lib/image/src",
];

/// `clip-model` the command downloads weights from the model hub; a worker only
/// opens the bundle that it made.
const NOT_BY_WORKERS: &[&str] = &["lib/model/src/main.rs", "lib/model/src/fetch.rs"];

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
        shared: WORKER,
        never_run: NOT_BY_WORKERS,
    },
    Program {
        name: "express",
        own: &["functions/express/src"],
        shared: WORKER,
        never_run: NOT_BY_WORKERS,
    },
];

#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub variables: BTreeSet<String>,
    /// SDK operations that it calls, in snake case.
    pub operations: BTreeSet<String>,
    /// Calls that are sent, but whose operation cannot be told.
    pub unknown_calls: Vec<String>,
    /// All string literals: names of metrics and dimensions are among them.
    pub literals: BTreeSet<String>,
}

#[derive(Clone, Default)]
pub struct Programs(pub BTreeMap<&'static str, Facts>);

impl Programs {
    pub fn read(root: &Path) -> anyhow::Result<Self> {
        let mut programs = BTreeMap::new();
        for program in PROGRAMS {
            let own = read_folders(root, program.own, program.never_run)?;
            let shared = read_folders(root, program.shared, program.never_run)?;
            programs.insert(program.name, facts(&own, &shared));
        }
        Ok(Self(programs))
    }

    pub fn of(&self, name: &str) -> Facts {
        self.0.get(name).cloned().unwrap_or_default()
    }
}

fn read_folders(root: &Path, folders: &[&str], never_run: &[&str]) -> anyhow::Result<Vec<Source>> {
    let mut sources = Vec::new();
    let mut waiting: Vec<_> = folders.iter().map(|folder| root.join(folder)).collect();
    while let Some(path) = waiting.pop() {
        let unreadable = || format!("{} cannot be read", path.display());
        if path.is_dir() {
            for entry in fs::read_dir(&path).with_context(unreadable)? {
                waiting.push(entry.with_context(unreadable)?.path());
            }
        } else if path.extension().is_some_and(|kind| kind == "rs")
            && !never_run.iter().any(|file| path == root.join(file))
        {
            let text = fs::read_to_string(&path).with_context(unreadable)?;
            sources.push(Source::parse(&text).with_context(unreadable)?);
        }
    }
    Ok(sources)
}

/// The facts of a program of `own` files that uses `shared` ones. A public
/// function of a shared file counts only if code that counts names it.
fn facts(own: &[Source], shared: &[Source]) -> Facts {
    let mut names: BTreeSet<String> = own.iter().flat_map(Source::words).collect();
    let reached = loop {
        let reached: Vec<Source> = shared.iter().map(|file| file.used(&names)).collect();
        let before = names.len();
        names.extend(reached.iter().flat_map(Source::words));
        if names.len() == before {
            break reached;
        }
    };
    let all: Vec<&Source> = own.iter().chain(&reached).collect();
    let constants: BTreeMap<String, String> =
        all.iter().flat_map(|file| file.constants()).collect();
    let mut facts = Facts::default();
    for file in all {
        facts.variables.extend(file.variables(&constants));
        facts
            .literals
            .extend(file.0.iter().filter_map(|token| literal(token)));
        file.find_operations(&mut facts);
    }
    // Read by tracing_subscriber.
    if names.contains("try_from_default_env") {
        facts.variables.insert("RUST_LOG".to_owned());
    }
    facts
}

/// How a variable is read: the methods of `platform::env::Reader`.
const READERS: &[&str] = &[
    "optional", "required", "parsed", "within", "seconds", "flag", "choice",
];

/// Methods without arguments before the one that names an operation.
const CONVERSIONS: &[&str] = &["clone", "client", "as_ref"];

/// Words that may stand before an expression.
const KEYWORDS: &[&str] = &["match", "return", "if", "let", "while"];

/// The tokens of a file, without comments, tests and imports: to import a
/// function is not to call it. A string literal keeps its quotes.
#[derive(Clone)]
struct Source(Vec<String>);

impl Source {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let stream: TokenStream = text.parse().map_err(|error| anyhow!("no Rust: {error}"))?;
        let mut all = Vec::new();
        flatten(stream, &mut all);
        let mut kept = Vec::new();
        let mut at = 0;
        while at < all.len() {
            at = match strings(&all[at..]) {
                ["#", "[", "cfg", "(", "test", ")", "]", ..] => item_end(&all, at + 7),
                ["#", "[", "doc", ..] => at + 6,
                // `use<'a>` in a bound is no import.
                ["use", next, ..] if next != "<" => item_end(&all, at),
                _ => {
                    kept.push(all[at].clone());
                    at + 1
                }
            };
        }
        Ok(Self(kept))
    }

    fn words(&self) -> impl Iterator<Item = String> {
        let is_word = |token: &&String| token.starts_with(|first: char| first.is_alphabetic());
        self.0.iter().filter(is_word).cloned()
    }

    /// Without the public functions at the top level that nobody names.
    fn used(&self, names: &BTreeSet<String>) -> Self {
        let mut kept = Vec::new();
        let (mut at, mut depth) = (0, 0);
        while at < self.0.len() {
            let name = match strings(&self.0[at..]) {
                ["pub", "fn", name, ..] | ["pub", "async", "fn", name, ..] if depth == 0 => {
                    Some(name)
                }
                _ => None,
            };
            if name.is_some_and(|name| !names.contains(name)) {
                at = item_end(&self.0, at);
                continue;
            }
            depth += nesting(&self.0[at]);
            kept.push(self.0[at].clone());
            at += 1;
        }
        Self(kept)
    }

    /// `const NAME: &str = "value";`
    fn constants(&self) -> Vec<(String, String)> {
        let constant = |window: &[String]| match strings(window) {
            ["const", name, ":", "&", "str", "=", value] => {
                Some((name.to_owned(), literal(value)?))
            }
            _ => None,
        };
        self.0.windows(7).filter_map(constant).collect()
    }

    fn variables(&self, constants: &BTreeMap<String, String>) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for at in 0..self.0.len() {
            // Where the name stands, as a literal or a path to a constant.
            let skipped = match strings(&self.0[at..]) {
                [".", reader, "(", ..] if READERS.contains(&reader) => 3,
                ["env", ":", ":", "var" | "var_os", "(", ..] => 5,
                // A helper that is handed the reader: `queue_url(env, "QUEUE_URL")`.
                ["(", "env", ",", ..] => 3,
                // An argument of the command line that the environment gives, too.
                ["env", "=", ..] => 2,
                ["#", "[", "arg", "(", ..] => {
                    found.extend(self.named_by_its_field(at));
                    continue;
                }
                _ => continue,
            };
            let rest = &self.0[at + skipped..];
            let end = rest
                .iter()
                .position(|token| [",", ")"].contains(&token.as_str()));
            let name = rest[..end.unwrap_or(0)].last();
            let name = name.and_then(|token| literal(token).or(constants.get(token).cloned()));
            found.extend(name.filter(|name| is_variable(name)));
        }
        found
    }

    /// `#[arg(long, env)] queue_url: Url`: the field's name in capitals.
    fn named_by_its_field(&self, at: usize) -> Option<String> {
        let end = at + 2 + block_length(&self.0[at + 1..]);
        let is_bare = |pair: &[String]| pair[0] == "env" && [",", ")"].contains(&pair[1].as_str());
        self.0[at..end].windows(2).find(|pair| is_bare(pair))?;
        let field = self.0[end..].windows(2).find(|pair| pair[1] == ":")?;
        Some(field[0].to_uppercase())
    }

    /// The operations whose requests are sent, and the sends whose operation
    /// cannot be told.
    fn find_operations(&self, facts: &mut Facts) {
        for at in 0..self.0.len() {
            let [".", "send" | "into_paginator", "(", ")", ..] = strings(&self.0[at..]) else {
                continue;
            };
            let expression = &self.0[self.expression_start(at)..at];
            match operation_of(expression).or_else(|| self.operation_of_variable(at, expression)) {
                Some(operation) => {
                    facts.operations.insert(operation);
                }
                // `.into_paginator().send()`: counted at the paginator.
                None if expression
                    .ends_with(&[".", "into_paginator", "(", ")"].map(str::to_owned)) => {}
                None => {
                    let call = [expression, &self.0[at..at + 4]].concat();
                    facts.unknown_calls.push(call.concat());
                }
            }
        }
    }

    /// Where the expression that `at` ends begins.
    fn expression_start(&self, at: usize) -> usize {
        let mut depth = 0;
        for start in (0..at).rev() {
            let token = self.0[start].as_str();
            let is_outside = depth == 0;
            depth -= nesting(token);
            // A block that ended before, or the one that this is in.
            let is_boundary = matches!(token, ";" | "," | "}" | "=") || nesting(token) > 0;
            let is_arrow = token == ">" && start > 0 && self.0[start - 1] == "=";
            if is_outside && (is_boundary || is_arrow) {
                return start + 1;
            }
        }
        0
    }

    /// `let request = client.run_task()…; … request.send()`, or the same with
    /// `mut` and later assignments.
    fn operation_of_variable(&self, at: usize, expression: &[String]) -> Option<String> {
        let is_keyword = |token: &&String| KEYWORDS.contains(&token.as_str());
        let name = expression.iter().find(|token| !is_keyword(token))?;
        let binds = |start: &usize| match strings(&self.0[*start..]) {
            ["let", bound, "=", ..] | ["let", "mut", bound, "=", ..] => bound == name,
            _ => false,
        };
        let start = (0..at).rev().find(binds)?;
        let value = self.0[start..at].iter().position(|token| token == "=")? + start + 1;
        let end = self.0[value..at].iter().position(|token| token == ";")? + value;
        operation_of(&self.0[value..end])
    }
}

fn flatten(stream: TokenStream, all: &mut Vec<String>) {
    for token in stream {
        match token {
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::None => ("", ""),
                };
                all.push(open.to_owned());
                flatten(group.stream(), all);
                all.push(close.to_owned());
            }
            other => all.push(other.to_string()),
        }
    }
}

/// The next few tokens, to be matched.
fn strings(tokens: &[String]) -> [&str; 7] {
    std::array::from_fn(|index| tokens.get(index).map_or("", String::as_str))
}

fn nesting(token: &str) -> i32 {
    match token {
        "(" | "[" | "{" => 1,
        ")" | "]" | "}" => -1,
        _ => 0,
    }
}

/// Up to the end of the group that the first token opens.
fn block_length(tokens: &[String]) -> usize {
    let mut depth = 0;
    let closes = tokens.iter().position(|token| {
        depth += nesting(token);
        depth == 0
    });
    closes.unwrap_or(tokens.len())
}

/// Where the item at `at` ends: after its block or, before any, its `;`.
fn item_end(tokens: &[String], mut at: usize) -> usize {
    while at < tokens.len() {
        match tokens[at].as_str() {
            ";" => return at + 1,
            "{" => return at + block_length(&tokens[at..]) + 1,
            "(" | "[" => at += block_length(&tokens[at..]),
            _ => at += 1,
        }
    }
    at
}

fn literal(token: &str) -> Option<String> {
    Some(token.strip_prefix('"')?.strip_suffix('"')?.to_owned())
}

fn is_variable(name: &str) -> bool {
    let is_capital = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    name.starts_with(|first: char| first.is_ascii_uppercase()) && name.bytes().all(is_capital)
}

/// The first method without arguments in a chain: `client.get_object()…`.
fn operation_of(expression: &[String]) -> Option<String> {
    let mut depth = 0;
    for (at, token) in expression.iter().enumerate() {
        depth += nesting(token);
        if depth == 0
            && let [".", name, "(", ")", ..] = strings(&expression[at..])
            && !CONVERSIONS.contains(&name)
        {
            return Some(name.to_owned()).filter(|name| name != "into_paginator");
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(own: &str, shared: &str) -> Facts {
        facts(
            &[Source::parse(own).unwrap()],
            &[Source::parse(shared).unwrap()],
        )
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
                logs();
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
    fn variables_of_the_command_line_are_found_by_name_and_by_field() {
        let found = of(
            r#"
            #[derive(Parser)]
            struct Arguments {
                /// Read from "A_COMMENT"
                #[arg(long, env = "MODEL_URI", value_name = "URI")]
                model: Uri,
                #[arg(long, env, default_value_t = 8)]
                pub batch_size: usize,
                #[arg(long)]
                not_from_there: bool,
            }
            "#,
            "",
        );
        let names: Vec<&str> = found.variables.iter().map(String::as_str).collect();
        assert_eq!(names, ["BATCH_SIZE", "MODEL_URI"]);
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
