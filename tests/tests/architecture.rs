//! The crate graph is the one that `ARCHITECTURE.md` shows, and the tree keeps its habits.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Crate → (folder, crates of this project that it links outside tests), as the page says.
fn drawn() -> BTreeMap<String, (String, BTreeSet<String>)> {
    let page = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let table = page.split("```crates\n").nth(1).unwrap().split("```").next().unwrap();
    table
        .lines()
        .map(|line| {
            let mut words = line.split_whitespace().map(str::to_owned);
            let (name, folder) = (words.next().unwrap(), words.next().unwrap());
            (name, (folder, words.filter(|w| w != "-").collect()))
        })
        .collect()
}

/// The same, as cargo says.
fn found() -> BTreeMap<String, (String, BTreeSet<String>)> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let text = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
    packages
        .iter()
        .map(|package| {
            let manifest = PathBuf::from(text(&package["manifest_path"]));
            let folder = manifest.parent().unwrap().strip_prefix(root()).unwrap().display().to_string();
            let links = package["dependencies"].as_array().unwrap().iter();
            let ours = links
                .filter(|d| d["kind"].as_str() != Some("dev"))
                .map(|d| text(&d["name"]))
                .filter(|name| name.starts_with("blixard-"));
            (text(&package["name"]), (folder, ours.collect()))
        })
        .collect()
}

#[test]
fn the_crate_graph_is_the_one_in_the_architecture_page() {
    let (drawn, found) = (drawn(), found());
    assert_eq!(drawn.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "crates");
    for (name, (folder, links)) in &found {
        let (folder_drawn, links_allowed) = &drawn[name];
        assert_eq!(folder_drawn, folder, "folder of {name}");
        let extra: Vec<_> = links.difference(links_allowed).collect();
        assert!(extra.is_empty(), "{name} links {extra:?}, which the page does not allow");
        let unused: Vec<_> = links_allowed.difference(links).collect();
        assert!(unused.is_empty(), "the page says that {name} links {unused:?}; it does not");
    }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_source_file_begins_by_saying_what_it_is() {
    let mut files = Vec::new();
    sources(&root(), &mut files);
    assert!(files.len() > 20, "sources were found");
    let silent: Vec<_> =
        files.iter().filter(|f| !std::fs::read_to_string(f).unwrap().starts_with("//!")).collect();
    assert!(silent.is_empty(), "without a header: {silent:#?}");
}

#[test]
fn every_crate_keeps_the_one_lint_list() {
    for (folder, _) in found().values() {
        let manifest = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{folder}/Cargo.toml");
    }
}

#[test]
fn the_folders_at_the_root_are_the_agreed_ones() {
    let allowed = ["agent", "bench", "cluster", "docs", "fuzz", "netd", "nix", "target", "tests", "vmm"];
    for entry in std::fs::read_dir(root()).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let hidden = name.starts_with('.');
        assert!(hidden || !entry.path().is_dir() || allowed.contains(&name.as_str()), "{name}/");
    }
}
