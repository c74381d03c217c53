//! The code in the README is the example of the crate's documentation, which is compiled and run.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[test]
fn every_line_of_code_in_the_readme_is_run_as_the_example_of_the_crate() {
    let (readme, library) = (include_str!("../README.md"), include_str!("../src/lib.rs"));
    let code =
        readme.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next()).expect("there is code");
    assert!(code.lines().count() > 10);
    for line in code.lines().filter(|line| !line.is_empty()) {
        assert!(library.contains(&format!("\n//! {line}\n")), "{line}");
    }
}
