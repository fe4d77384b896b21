//! The first root of a guest: init and the modules it loads, as a `newc` cpio archive (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Layout: `/init`; `/modules/order`, one file name per line in load order; `/modules/*.ko`; empty `/dev`, `/proc`,
//! `/sys`; and `/dev/console` and `/dev/null`, which a program needs for its standard streams before anything is
//! mounted. The VMM appends an archive with `/blixard.json`.

use std::io::{self, Write};

/// Most modules (init refuses more).
pub const MODULES_MAX: usize = 512;

/// Why an initramfs cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// Init refuses this name of a module.
    #[error("\"{0}\" is no file name of a module: letters, digits and _-.+ that end in .ko are possible")]
    Name(String),
    /// A module comes twice.
    #[error("module {0} comes twice")]
    Twice(String),
    /// There are too many modules.
    #[error("{0} modules are more than {MODULES_MAX}")]
    TooMany(usize),
    /// A file is longer than the format can say (4 GiB).
    #[error("{0} is longer than 4 GiB")]
    TooLong(String),
    /// The archive cannot be written.
    #[error("writing the initramfs")]
    Write(#[source] io::Error),
}

/// True if init takes this file name for a module.
pub(crate) fn is_module_name(name: &str) -> bool {
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.+".contains(&byte));
    plain && !name.starts_with('.') && name.ends_with(".ko") && name.len() <= 255
}

/// Writes the archive; the same input gives the same bytes. `modules` are in load order, uncompressed.
///
/// # Errors
/// See [`InitramfsError`].
pub fn build_initramfs(
    init: &[u8],
    modules: &[(String, Vec<u8>)],
    out: &mut dyn Write,
) -> Result<(), InitramfsError> {
    if modules.len() > MODULES_MAX {
        return Err(InitramfsError::TooMany(modules.len()));
    }
    let mut order = String::new();
    let mut names = std::collections::BTreeSet::new();
    for (name, _) in modules {
        if !is_module_name(name) {
            return Err(InitramfsError::Name(crate::tar::shown(name.as_bytes())));
        }
        if !names.insert(name) {
            return Err(InitramfsError::Twice(name.clone()));
        }
        order.push_str(name);
        order.push('\n');
    }
    let mut archive = Cpio { out, number: 0 };
    for directory in ["dev", "proc", "sys", "modules"] {
        archive.entry(directory, DIRECTORY | 0o755, (0, 0), &[])?;
    }
    archive.entry("dev/console", CHARACTER | 0o600, (5, 1), &[])?;
    archive.entry("dev/null", CHARACTER | 0o666, (1, 3), &[])?;
    archive.entry("init", FILE | 0o755, (0, 0), init)?;
    archive.entry("modules/order", FILE | 0o644, (0, 0), order.as_bytes())?;
    for (name, contents) in modules {
        archive.entry(&format!("modules/{name}"), FILE | 0o644, (0, 0), contents)?;
    }
    archive.entry("TRAILER!!!", 0, (0, 0), &[])
}

const FILE: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER: u32 = 0o020_000;

struct Cpio<'a> {
    out: &'a mut dyn Write,
    number: u32,
}

impl Cpio<'_> {
    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        device: (u32, u32),
        contents: &[u8],
    ) -> Result<(), InitramfsError> {
        self.number += 1;
        let length = u32::try_from(contents.len()).map_err(|_| InitramfsError::TooLong(name.into()))?;
        let name_length = u32::try_from(name.len() + 1).map_err(|_| InitramfsError::TooLong(name.into()))?;
        // Inode, mode, owner, group, links, time, length, device of the file, device it is, length of the name, and a
        // checksum that this kind of archive does not use.
        let fields = [self.number, mode, 0, 0, 1, 0, length, 0, 0, device.0, device.1, name_length, 0];
        let mut head = String::from("070701");
        for field in fields {
            head.push_str(&format!("{field:08x}"));
        }
        head.push_str(name);
        let mut head = head.into_bytes();
        head.push(0);
        head.resize(head.len().next_multiple_of(4), 0);
        let padding = contents.len().next_multiple_of(4) - contents.len();
        let padding = [0; 3].get(..padding).map(<[u8]>::to_vec).unwrap_or_default();
        for part in [head.as_slice(), contents, &padding] {
            self.out.write_all(part).map_err(InitramfsError::Write)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(modules: &[(&str, &[u8])]) -> Result<Vec<u8>, InitramfsError> {
        let modules: Vec<_> =
            modules.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        let mut out = vec![];
        build_initramfs(b"program", &modules, &mut out).map(|()| out)
    }

    #[test]
    fn cpio_lists_what_was_put_in() {
        let archive = build(&[("a.ko", b"12345"), ("b-c.ko", b"")]).unwrap();
        assert_eq!(archive.len() % 4, 0);
        let mut cpio = match std::process::Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
        {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                eprintln!("skipped: cpio is not installed (package cpio)");
                return;
            }
            cpio => cpio.unwrap(),
        };
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let seen: Vec<(&str, &str)> = lines.iter().map(|line| (line[0], *line.last().unwrap())).collect();
        assert_eq!(
            seen,
            [
                ("drwxr-xr-x", "dev"),
                ("drwxr-xr-x", "proc"),
                ("drwxr-xr-x", "sys"),
                ("drwxr-xr-x", "modules"),
                ("crw-------", "dev/console"),
                ("crw-rw-rw-", "dev/null"),
                ("-rwxr-xr-x", "init"),
                ("-rw-r--r--", "modules/order"),
                ("-rw-r--r--", "modules/a.ko"),
                ("-rw-r--r--", "modules/b-c.ko"),
            ]
        );
        assert_eq!(&lines[4][4..6], ["5,", "1"]);
    }

    #[test]
    fn the_order_is_the_order_given() {
        let archive = build(&[("z.ko", b""), ("a.ko", b"")]).unwrap();
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains("z.ko\na.ko\n"));
        assert_eq!(archive, build(&[("z.ko", b""), ("a.ko", b"")]).unwrap());
    }

    #[test]
    fn names_that_init_refuses_are_refused_here() {
        for name in ["../a.ko", "a", "a\n.ko", ".ko"] {
            assert!(matches!(build(&[(name, b"")]), Err(InitramfsError::Name(_))), "{name}");
        }
        assert!(matches!(build(&[("a.ko", b""), ("a.ko", b"")]), Err(InitramfsError::Twice(_))));
    }
}
