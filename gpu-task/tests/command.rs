//! The program as a person or ECS starts it.

use std::process::{Command, Output};

const LEAST: [(&str, &str); 5] = [
    (
        "INPUT_QUEUE_URL",
        "https://sqs.eu-west-1.amazonaws.com/1/in",
    ),
    (
        "DEAD_LETTER_QUEUE_URL",
        "https://sqs.eu-west-1.amazonaws.com/1/dead",
    ),
    (
        "OUTPUT_QUEUE_URL",
        "https://sqs.eu-west-1.amazonaws.com/1/out",
    ),
    ("CACHE_BUCKET", "cache"),
    ("MODEL_PATH", "/model"),
];

fn run(flags: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gpu-task"))
        .args(flags)
        .env_clear()
        .envs(LEAST)
        .envs(variables.iter().copied())
        .output()
        .expect("the program starts")
}

#[test]
fn variables_configure_it_a_flag_counts_more_and_an_empty_variable_not_at_all() {
    let output = run(
        &["--check-config", "--batch-size", "4"],
        &[
            ("BATCH_SIZE", "16"),
            ("STORES", "3"),
            ("DOWNLOADS", ""),
            ("MODEL_URI", " "),
        ],
    );
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{:?}", output.stderr);
    for expected in [
        "batch_size: 4",
        "stores: 3",
        "downloads: 16",
        "model_uri: None",
    ] {
        assert!(shown.contains(expected), "{expected} in {shown}");
    }
}

#[test]
fn a_wrong_variable_ends_it_with_2_and_is_named_with_its_value_and_what_is_accepted() {
    let output = run(&[], &[("BATCH_SIZE", "1000")]);
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    for expected in ["BATCH_SIZE", "1000", "1..=512"] {
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn the_help_names_variables_and_exit_codes() {
    let output = run(&["--help"], &[("BATCH_SIZE", "1000")]);
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    for expected in ["VISIBILITY_TIMEOUT_SECONDS", "ORT_DYLIB_PATH", "Exit codes"] {
        assert!(said.contains(expected), "{said}");
    }
}
