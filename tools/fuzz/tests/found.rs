//! What the fuzzer found and its seeds, without the fuzzer.

use std::path::Path;

#[test]
fn what_was_found_is_found_no_more() {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("found");
    let mut count = 0;
    for (name, target) in fuzz::TARGETS {
        let Ok(files) = std::fs::read_dir(found.join(name)) else {
            continue;
        };
        for file in files {
            let path = file.unwrap().path();
            eprintln!("{}", path.display());
            target(&std::fs::read(path).unwrap());
            count += 1;
        }
    }
    assert!(count > 0);
}
