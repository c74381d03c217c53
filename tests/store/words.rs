//! The documents and comments: the README is short, links have targets, lines have one width.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const README_LINES: usize = 170;
const LINE_CHARACTERS: usize = 100;

/// Every Markdown file of the project, by its path.
fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for folder in [".", "docs", "findings", "benches/peers", "integrations/wasmer", "integrations/wasmtime"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    assert!(found.len() >= 10, "{found:?}");
    found
}

/// The lines outside of fenced code, with their numbers from 1.
fn prose(text: &str) -> Vec<(usize, &str)> {
    let mut in_code = false;
    let mut lines = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        } else if !in_code {
            lines.push((number, line));
        }
    }
    lines
}

/// The anchor that a code forge generates for a heading: lower case, hyphens for spaces, no
/// punctuation.
fn anchor(heading: &str) -> String {
    heading
        .trim()
        .to_lowercase()
        .chars()
        .filter_map(|letter| match letter {
            ' ' => Some('-'),
            '-' | '_' => Some(letter),
            _ => letter.is_alphanumeric().then_some(letter),
        })
        .collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    prose(text)
        .into_iter()
        .filter(|(_, line)| line.starts_with('#'))
        .map(|(_, line)| anchor(line.trim_start_matches('#')))
        .collect()
}

/// The targets of `[text](target)` in a line.
fn targets(line: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some(at) = rest.find("](") {
        rest = &rest[at + 2..];
        let end = rest.find(')').unwrap_or(rest.len());
        found.push(&rest[..end]);
    }
    found
}

#[test]
fn the_readme_is_short() {
    let readme = include_str!("../../README.md");
    assert!(readme.lines().count() <= README_LINES, "README.md has {} lines", readme.lines().count());
}

#[test]
fn every_local_link_leads_to_a_file_and_every_anchor_to_a_heading() {
    let mut checked = 0;
    let mut wrong = Vec::new();
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for (number, line) in prose(&text) {
            for target in targets(line) {
                if target.contains("://") {
                    continue;
                }
                checked += 1;
                let (file, place) = target.split_once('#').unwrap_or((target, ""));
                let path =
                    if file.is_empty() { document.clone() } else { document.parent().unwrap().join(file) };
                let leads_there = path.exists()
                    && (place.is_empty() || anchors(&fs::read_to_string(&path).unwrap()).contains(place));
                if !leads_there {
                    wrong.push(format!("{}:{number}: {target}", document.display()));
                }
            }
        }
    }
    assert!(checked > 20, "only {checked} links were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn prose_is_wrapped_at_one_width() {
    let mut long = Vec::new();
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for (number, line) in prose(&text) {
            // A table cannot be wrapped, nor can a line that is one word or one link.
            let is_table = line.trim_start().starts_with('|');
            let text = line.trim().trim_start_matches("- ");
            let can_be_wrapped = text.contains(' ') && !text.starts_with("![");
            if !is_table && can_be_wrapped && line.chars().count() > LINE_CHARACTERS {
                long.push(format!("{}:{number}: {} characters", document.display(), line.chars().count()));
            }
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

/// The files below a folder with this extension.
fn files_below(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_below(&path, extension, found);
        } else if path.extension().is_some_and(|it| it == extension) {
            found.push(path);
        }
    }
}

#[test]
fn comments_are_wrapped_at_one_width() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "migrations", "benches", "tests", "integrations/wasmer", "integrations/wasmtime"] {
        files_below(&root.join(folder), "rs", &mut files);
    }
    assert!(files.len() > 200, "{} files", files.len());
    let mut long = Vec::new();
    for file in files.iter().filter(|file| !file.components().any(|part| part.as_os_str() == "target")) {
        let mut in_code = false;
        for (number, line) in (1..).zip(fs::read_to_string(file).unwrap().lines()) {
            let Some(comment) = line.trim_start().strip_prefix("//") else { continue };
            let text = comment.trim_start_matches(['/', '!']).trim();
            in_code ^= text.starts_with("```");
            // Tables cannot be wrapped. Drawings have columns, or lines of box characters.
            let is_drawing = text.contains("  ") || text.contains(['─', '│', '█', '░']);
            if !in_code && !text.starts_with('|') && !is_drawing && line.chars().count() > LINE_CHARACTERS {
                long.push(format!("{}:{number}: {} characters", file.display(), line.chars().count()));
            }
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

/// This package cannot compile code that needs an engine. The packages of the integrations compile
/// their READMEs, so one of these must contain each line of such code.
#[test]
fn code_of_the_readme_that_is_not_compiled_here_is_compiled_by_an_integration() {
    let compiled = [
        include_str!("../../integrations/wasmer/README.md"),
        include_str!("../../integrations/wasmtime/README.md"),
    ];
    let mut ignored = false;
    let mut lines = 0;
    for line in include_str!("../../README.md").lines() {
        if line.starts_with("```") {
            ignored = line == "```rust,ignore";
        } else if ignored {
            lines += 1;
            assert!(compiled.iter().any(|readme| readme.contains(line)), "{line}");
        }
    }
    assert!(lines > 0, "there is no such code");
}
