//! Where the other programs of Blixard are.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::CliError;

/// Folders for programs that users do not start themselves, beside the one of this program.
const LIBEXEC: [&str; 2] = ["/usr/libexec/blixard", "/usr/lib/blixard"];

/// Finds a program: in `folder` when there is one, otherwise beside this program, in its `../libexec/blixard`, and in PATH.
pub fn find(folder: Option<&Path>, name: &str) -> Result<PathBuf, CliError> {
    let candidates: Vec<PathBuf> = match folder {
        Some(folder) => vec![folder.join(name)],
        None => {
            let own = std::env::current_exe().and_then(std::fs::canonicalize).unwrap_or_default();
            let beside = own.parent().unwrap_or(Path::new("/"));
            let path = std::env::var_os("PATH").unwrap_or_default();
            [beside.join(name), beside.join("../libexec/blixard").join(name)]
                .into_iter()
                .chain(LIBEXEC.iter().map(|l| Path::new(l).join(name)))
                .chain(std::env::split_paths(&path).filter(|p| p.is_absolute()).map(|p| p.join(name)))
                .collect()
        }
    };
    candidates.into_iter().find(|c| c.is_file()).ok_or_else(|| {
        let place = folder
            .map_or("beside this program, in libexec or in PATH".into(), |f| format!("in {}", f.display()));
        CliError::Local {
            what: format!("the program {name} is not {place}"),
            source: io::ErrorKind::NotFound.into(),
            suggestion: Some("name the folder with --bin-dir; `make release` makes all programs".into()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_folder_is_the_only_one_that_is_searched() {
        let folder = tempfile::tempdir().unwrap();
        let error = find(Some(folder.path()), "sh").unwrap_err();
        assert!(error.to_text().contains("--bin-dir"), "{}", error.to_text());
        std::fs::write(folder.path().join("sh"), "").unwrap();
        assert_eq!(find(Some(folder.path()), "sh").unwrap(), folder.path().join("sh"));
        assert!(find(None, "sh").is_ok(), "found in PATH");
    }
}
