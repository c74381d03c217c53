//! The layers of the source: imports point down.
//!
//! `docs/design.md` says what each layer is for. This test reads the `crate::` paths of every file
//! and compares them with the table below. A new file must be added to the table.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// From the bottom up. A name stands for `src/NAME.rs` or everything in `src/NAME/`.
const LAYERS: [(&str, &[&str]); 7] = [
    (
        "units, progress, locks, workers, all Linux calls",
        &["units", "ranges", "text", "report", "progress", "sync", "workers", "sys"],
    ),
    ("what a region is", &["region", "hash", "codec", "delta"]),
    (
        "what a snapshot is",
        &[
            "record",
            "table",
            "root",
            "address_space",
            "threads",
            "run",
            "signals",
            "descriptors",
            "elf",
            "left_out",
            "mapped_files",
        ],
    ),
    ("what changed since a snapshot", &["track"]),
    ("where memory comes from, stays and goes", &["source", "store", "sink"]),
    ("the error of every verb", &["error"]),
    (
        "the verbs",
        &[
            "capture",
            "labels",
            "process",
            "restore",
            "coredump",
            "lazy",
            "template",
            "rollback",
            "same_process",
            "reservation",
            "forget",
            "gc",
            "verify",
            "repair",
            "snapshot",
            "diff",
            "history",
            "stats",
            "migrate",
        ],
    ),
];

/// These never import one another. What their `mod.rs` exports is for the verbs.
const SIBLINGS: [&str; 3] = ["source", "store", "sink"];

/// The steps between formats, in a separate directory: they work on stores, and only this verb uses
/// them.
const MIGRATIONS: (&str, &str) = ("migrations", "migrate");

/// The wings of the store, and what each may import from the rest of the store. The index is
/// derived from the packs, and the packs do not know it.
const WINGS: [(&str, &[&str]); 2] = [
    ("src/store/packs/", &["packs", "catalog", "error", "format", "id", "lock", "names", "tree"]),
    ("src/store/index/", &["index", "packs::location", "packs::watermark", "error", "id", "names", "tree"]),
];

/// The only file that names the database.
const DATABASE: (&str, &str) = ("sled", "src/store/index/database.rs");

/// Outside of the layers: the list of modules, the documents, the command, which is a separate
/// crate, the suites for implementations, and the entry points of the fuzz targets, which use
/// everything.
const OUTSIDE: [&str; 5] = ["src/lib.rs", "src/docs.rs", "src/bin", "src/conformance.rs", "src/fuzzing"];

// ---- The source files ---------------------------------------------------------------------------

struct SourceFile {
    /// Relative to the root of the project.
    path: String,
    /// Without comments, strings and unit tests.
    code: String,
}

impl SourceFile {
    /// Its name in the table.
    fn module(&self) -> &str {
        let inside = self.path.strip_prefix("src/").unwrap_or(&self.path);
        inside.split('/').next().unwrap().trim_end_matches(".rs")
    }

    fn is_outside(&self) -> bool {
        OUTSIDE.iter().any(|outside| self.path.starts_with(outside))
    }

    fn has_word(&self, word: &str) -> bool {
        self.code.split(|letter: char| !letter.is_alphanumeric() && letter != '_').any(|found| found == word)
    }

    /// Every path that begins with `crate::`, without that prefix: `store::error::StoreError`.
    fn imports(&self) -> Vec<String> {
        self.code.split("crate::").skip(1).flat_map(paths).collect()
    }
}

/// The paths at the start of a text: one, or one for each name in braces.
fn paths(text: &str) -> Vec<String> {
    let is_path = |letter: char| letter.is_alphanumeric() || letter == '_' || letter == ':';
    let end = text.find(|letter| !is_path(letter)).unwrap_or(text.len());
    let (path, rest) = text.split_at(end);
    let Some(group) = rest.strip_prefix('{').filter(|_| path.is_empty() || path.ends_with("::")) else {
        return vec![path.trim_end_matches("::").to_owned()];
    };
    let (mut depth, mut names, mut name_start) = (0, Vec::new(), 0);
    for (at, letter) in group.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                names.push(group[name_start..at].trim());
                name_start = at + 1;
                if letter == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    let inside = names.into_iter().filter(|name| !name.is_empty()).flat_map(paths);
    inside.map(|inside| format!("{path}{inside}")).collect()
}

/// The text without comments, strings and what follows `#[cfg(test)]` on a module.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let mut code = String::new();
    let mut rest = text;
    while let Some(letter) = rest.chars().next() {
        let is_literal_quote = code.ends_with('\'');
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if letter == '"' && !is_literal_quote {
            let mut is_escaped = false;
            let end = rest[1..].find(|letter| {
                let is_end = letter == '"' && !is_escaped;
                is_escaped = letter == '\\' && !is_escaped;
                is_end
            });
            end.map_or(rest.len(), |end| end + 2)
        } else {
            code.push(letter);
            letter.len_utf8()
        };
        rest = &rest[skipped..];
    }
    code
}

fn source_files() -> Vec<SourceFile> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for dir in ["src", "migrations"] {
        collect(&root.join(dir), &mut found);
    }
    found.sort();
    let read = |path: PathBuf| SourceFile {
        code: code(&std::fs::read_to_string(&path).unwrap()),
        path: path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(),
    };
    found.into_iter().map(read).collect()
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|(_, modules)| modules.contains(&module))
}

/// What is wrong with an import, if anything.
fn complaint(module: &str, import: &str) -> Option<String> {
    let target = import.split("::").next().unwrap();
    if target == module {
        return None;
    }
    if target == MIGRATIONS.0 {
        return (module != MIGRATIONS.1).then(|| format!("only {} reaches the migrations", MIGRATIONS.1));
    }
    let Some(to) = layer(target) else {
        return Some(format!("`{target}` is in no layer; name the module that has it"));
    };
    // Migrations work on stores.
    let from = layer(if module == MIGRATIONS.0 { "store" } else { module })?;
    if to > from {
        return Some(format!("{} is above {}", LAYERS[to].0, LAYERS[from].0));
    }
    let are_siblings = SIBLINGS.contains(&module) && SIBLINGS.contains(&target);
    are_siblings.then(|| format!("{SIBLINGS:?} never import one another"))
}

// ---- The rules ----------------------------------------------------------------------------------

#[test]
fn every_file_is_in_one_layer_and_every_name_in_the_table_is_a_file() {
    let in_table: Vec<&str> = LAYERS.iter().flat_map(|(_, modules)| *modules).copied().collect();
    let files = source_files();
    let modules: BTreeSet<&str> =
        files.iter().filter(|file| !file.is_outside()).map(SourceFile::module).collect();
    let expected: BTreeSet<&str> = in_table.iter().copied().chain([MIGRATIONS.0]).collect();
    assert_eq!(modules, expected);
    assert_eq!(in_table.len() + 1, expected.len(), "a name stands twice in the table");
}

#[test]
fn imports_point_down() {
    let mut complaints = Vec::new();
    let mut imports = 0;
    for file in source_files().iter().filter(|file| !file.is_outside()) {
        for import in file.imports() {
            imports += 1;
            let why = complaint(file.module(), &import);
            complaints.extend(why.map(|why| format!("{} imports {import}: {why}", file.path)));
        }
    }
    assert!(imports > 100, "found only {imports} imports: are they still read?");
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

/// Whether a file of a wing may import this from the store.
fn is_in_reach(allowed: &[&str], import: &str) -> bool {
    let Some(inside) = import.strip_prefix("store::") else { return true };
    let leads_to = |name: &&str| {
        inside.strip_prefix(*name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    };
    allowed.iter().any(leads_to)
}

#[test]
fn the_wings_of_the_store_import_only_what_is_below_them() {
    for (wing, allowed) in WINGS {
        let files: Vec<_> = source_files().into_iter().filter(|file| file.path.starts_with(wing)).collect();
        assert!(files.len() > 3, "{wing} has {} files", files.len());
        for file in files {
            let out_of_reach: Vec<String> =
                file.imports().into_iter().filter(|import| !is_in_reach(allowed, import)).collect();
            assert_eq!(out_of_reach, [""; 0], "{}", file.path);
        }
    }
    assert!(!is_in_reach(WINGS[0].1, "store::index::Index"));
    assert!(!is_in_reach(WINGS[1].1, "store::packs::log::Log"));
}

#[test]
fn the_command_uses_the_library_as_anybody_would() {
    for file in source_files().iter().filter(|file| file.path.starts_with("src/bin")) {
        assert!(!file.code.contains("#[path"), "{} includes a file of the library", file.path);
    }
}

#[test]
fn unsafe_code_is_in_sys_only() {
    let (inside, outside): (Vec<_>, Vec<_>) = source_files()
        .into_iter()
        .filter(|file| file.has_word("unsafe"))
        .map(|file| file.path)
        .partition(|path| path.starts_with("src/sys/"));
    assert_eq!(outside, [""; 0]);
    assert!(!inside.is_empty(), "there is some: is it still found?");
}

#[test]
fn one_file_names_the_database() {
    let files: Vec<String> =
        source_files().into_iter().filter(|file| file.has_word(DATABASE.0)).map(|file| file.path).collect();
    assert_eq!(files, [DATABASE.1]);
}

// ---- The tests of this test ---------------------------------------------------------------------

#[test]
fn a_rule_that_is_broken_is_noticed() {
    for (module, import) in [
        ("store", "capture::CaptureStats"),
        ("store", "source::Source"),
        ("source", "sink::SinkError"),
        ("hash", "record::Record"),
        ("verify", "migrations::run"),
        ("migrations", "gc::GcOptions"),
        ("store", "migrations::run"),
        ("store", "error::Error"),
        ("progress", "error::Error"),
        ("error", "gc::GcStats"),
        ("gc", "Store"),
    ] {
        assert!(complaint(module, import).is_some(), "{module} imports {import}");
    }
    for (module, import) in [
        ("gc", "store::gate::Condemned"),
        ("repair", "verify::VerifyOptions"),
        ("migrate", "migrations"),
        ("migrations", "store::format::Format"),
        ("error", "sink::SinkError"),
        ("store", "store::index"),
    ] {
        assert_eq!(complaint(module, import), None, "{module} imports {import}");
    }
}

#[test]
fn imports_are_found_however_they_are_written() {
    let text = r##"
        //! crate::comment
        use crate::store::{Shared, read::{Check, Reader}};
        use crate::{gc::GcOptions, hash::Hash};
        fn f() -> crate::error::Error { let quote = '"'; let text = "crate::string"; crate::table::count() }
        #[cfg(test)]
mod tests { use crate::unit::Test; }
    "##
    .replace("        #[cfg", "#[cfg");
    let file = SourceFile { path: "src/x.rs".to_owned(), code: code(&text) };
    let expected = [
        "store::Shared",
        "store::read::Check",
        "store::read::Reader",
        "gc::GcOptions",
        "hash::Hash",
        "error::Error",
        "table::count",
    ];
    assert_eq!(file.imports(), expected);
}
