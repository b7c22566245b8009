//! What others wrote, in the log: the real one, of a process of its own.

use std::process::Command;

const NAME: &str = "what_others_wrote_forges_no_line_and_steers_no_terminal";
const HOSTILE: &str = "a.png\n{\"level\":\"ERROR\",\"message\":\"forged\"}\r\u{1b}[2J";

#[test]
fn what_others_wrote_forges_no_line_and_steers_no_terminal() {
    if std::env::var_os("IS_THE_WRITER").is_some() {
        platform::init_logs("test");
        tracing::warn!(key = HOSTILE, label = %HOSTILE, "cannot be decoded: {HOSTILE}");
        return;
    }
    let log = |format: &str| {
        let mut writer = Command::new(std::env::current_exe().unwrap());
        writer.args(["--exact", NAME, "--nocapture"]);
        writer.env("IS_THE_WRITER", "1").env("LOG_FORMAT", format);
        writer.env("RUST_LOG", "info");
        String::from_utf8(writer.output().unwrap().stderr).unwrap()
    };
    let json = log("json");
    let line: serde_json::Value = serde_json::from_str(json.trim_end()).expect("one line");
    assert_eq!(line["level"], "WARN");
    assert_eq!(line["key"], HOSTILE);
    for text in [json, log("text")] {
        assert!(
            text.contains("a.png") && !text.contains("\u{1b}[2J"),
            "{text:?}"
        );
    }
}
