//! Imports through the public function, with archives made by the `tar` crate and by hand.

mod hostile;
mod images;
mod kernels;
mod property;
mod rootfs;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek};

use ::tar::{Builder, EntryType, Header};

use crate::erofs::reader::{Found, read};
use crate::{ImageSource, ImportError, ImportedImage, Limits, hex, import_rootfs};

type Paths = BTreeMap<Vec<u8>, Found>;

/// Imports an archive; the answer is what came of it, all paths of the image, and its bytes.
fn import_with(limits: &Limits, archive: &[u8]) -> Result<(ImportedImage, Paths, Vec<u8>), ImportError> {
    let spool = tempfile::tempdir().unwrap();
    let mut out = tempfile::tempfile().unwrap();
    let mut stream = archive;
    let source = ImageSource { stream: &mut stream, spool: spool.path() };
    let mut last = 0;
    let imported = import_rootfs(source, limits, &mut out, &mut |read| {
        assert!(read >= last);
        last = read;
    })?;
    assert_eq!(std::fs::read_dir(spool.path()).unwrap().count(), 0, "nothing is left in the spool directory");
    let image = whole(&mut out);
    assert_eq!(imported.bytes, image.len() as u64);
    let paths = read(&image);
    Ok((imported, paths, image))
}

fn whole(file: &mut File) -> Vec<u8> {
    let mut bytes = vec![];
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn import(archive: &[u8]) -> Paths {
    import_with(&Limits::default(), archive).unwrap().1
}

/// An error with its causes.
fn refusal(archive: &[u8]) -> String {
    refusal_with(&Limits::default(), archive)
}

fn refusal_with(limits: &Limits, archive: &[u8]) -> String {
    let error = import_with(limits, archive).map(|_| ()).unwrap_err();
    let mut text = error.to_string();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(&error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Builds archives entry by entry.
struct Tar(Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(Builder::new(vec![]))
    }

    fn entry(mut self, kind: EntryType, path: &str, target: &str, contents: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o750 } else { 0o640 });
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1_000_000);
        header.set_size(contents.len() as u64);
        // The names as they are: the crate would refuse the hostile ones.
        let raw = header.as_mut_bytes();
        raw[..path.len()].copy_from_slice(path.as_bytes());
        raw[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        self.0.append(&header, contents).unwrap();
        self
    }

    fn file(self, path: &str, contents: &[u8]) -> Self {
        self.entry(EntryType::Regular, path, "", contents)
    }

    fn directory(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path, "", b"")
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, target, b"")
    }

    fn hardlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path, target, b"")
    }

    /// A file with pax records in front.
    fn with_pax(mut self, records: &[(&str, &[u8])], path: &str, contents: &[u8]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self.file(path, contents)
    }

    fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}
