//! Loads the kernel modules that the initramfs carries: `/modules/order` names them, one per line, each after those
//! it needs; they are not compressed.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

/// Most modules.
const MODULES_MAX: usize = 512;

/// A line of the order file that is no file name of a module.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// This line is not a plain file name ending in `.ko`.
    #[error("line {line} of the module order is no module name: {name:?}")]
    NotAName {
        /// Line number, from 1.
        line: usize,
        /// The line.
        name: String,
    },
    /// There are too many lines.
    #[error("the module order has more than {MODULES_MAX} lines")]
    TooMany,
}

/// The names in an order file.
///
/// # Errors
/// A line that could lead outside of the directory, or too many lines.
pub fn parse_order(text: &str) -> Result<Vec<&str>, OrderError> {
    let names: Vec<&str> = text.lines().take(MODULES_MAX + 1).collect();
    if names.len() > MODULES_MAX {
        return Err(OrderError::TooMany);
    }
    for (line, name) in (1..).zip(&names) {
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.+".contains(&b));
        if !plain || name.starts_with('.') || !name.ends_with(".ko") || name.len() > 255 {
            return Err(OrderError::NotAName { line, name: (*name).into() });
        }
    }
    Ok(names)
}

/// Loads one module; one that is there already is fine.
///
/// # Errors
/// The file cannot be opened, or the kernel's answer.
pub fn load(directory: &Path, name: &str) -> io::Result<()> {
    let file = File::open(directory.join(name))?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_the_file_is_kept() {
        assert_eq!(parse_order("virtio.ko\nvirtio-rng.ko\n").unwrap(), ["virtio.ko", "virtio-rng.ko"]);
        assert!(parse_order("").unwrap().is_empty());
    }

    #[test]
    fn a_line_that_leaves_the_directory_is_refused_with_its_number() {
        for name in ["../a.ko", "a/b.ko", ".ko", "a.ko.xz", "", "a b.ko"] {
            let text = format!("good.ko\n{name}\n");
            let error = parse_order(&text).unwrap_err();
            assert_eq!(error, OrderError::NotAName { line: 2, name: name.into() });
        }
    }

    #[test]
    fn a_flood_of_lines_is_refused() {
        assert_eq!(parse_order(&"a.ko\n".repeat(MODULES_MAX + 1)), Err(OrderError::TooMany));
    }
}
