//! The documents: the tests that they name for their promises.

use std::fs;
use std::path::{Path, PathBuf};

/// Returns the source files below `dir`.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// Returns what stands between backticks in `text`, with the number of its line.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate();
    lines.flat_map(|(at, line)| line.split('`').skip(1).step_by(2).map(move |code| (at + 1, code)))
}

#[test]
fn the_tests_that_the_documents_name_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let all = [sources(&root.join("src")), sources(&root.join("tests"))].concat();
    let (mut named, mut missing) = (0, Vec::new());
    for document in ["semantics.md", "security.md", "remote.md", "formats.md", "streams.md"] {
        let text = fs::read_to_string(root.join("docs").join(document)).unwrap();
        for (line, code) in code(&text) {
            // `module::test` of tests/it, or `src/file.rs::test`.
            let Some((place, test)) = code.rsplit_once("::") else { continue };
            let is_file = place.starts_with("src/");
            let is_name =
                |name: &str| name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_'));
            if test.is_empty() || !is_name(test) || !(is_file || is_name(place)) {
                continue;
            }
            named += 1;
            let file =
                if is_file { root.join(place) } else { root.join(format!("tests/it/{place}.rs")) };
            let holds = |path: &PathBuf| {
                let is_there = *path == file || path.starts_with(file.with_extension(""));
                is_there && fs::read_to_string(path).unwrap().contains(&format!("fn {test}("))
            };
            if !all.iter().any(holds) {
                missing.push(format!("docs/{document}:{line}: {code}"));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
    assert!(named > 300, "only {named} tests are named");
}
