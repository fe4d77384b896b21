//! Empty copy-on-write disks over a base file, without `qemu-img` (it is in another package than QEMU).
//!
//! Source: QEMU, `docs/interop/qcow2.txt` (version 3 header, header extensions, L1 and refcount tables).

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: usize = 1 << CLUSTER_BITS;
/// Bytes that one L1 entry covers: a cluster full of 8-byte L2 entries, a cluster each.
const L1_SPAN: u64 = (CLUSTER as u64 / 8) << CLUSTER_BITS;
const HEADER_LENGTH: u32 = 104;
const MAX_BACKING_NAME: usize = 1023;

/// Format of the base file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// A plain disk image.
    Raw,
    /// Another copy-on-write disk.
    Qcow2,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The base file's path does not fit the header.
    #[error("the path of the base disk is longer than {MAX_BACKING_NAME} bytes")]
    NameTooLong,
    /// The disk needs more than one cluster of L1 entries (4 TiB).
    #[error("a disk of {0} bytes is too large")]
    TooLarge(u64),
    /// The file could not be written.
    #[error("cannot write the disk {path}")]
    Write {
        /// The new disk.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Makes `path` a disk of `size` bytes that reads as `base` until written.
pub fn create(path: &Path, base: &Path, format: Base, size: u64) -> Result<(), Error> {
    let bytes = encode(base.as_os_str().as_bytes(), format, size)?;
    let write = || OpenOptions::new().write(true).create_new(true).open(path)?.write_all(&bytes);
    write().map_err(|source| Error::Write { path: path.display().to_string(), source })
}

/// Four clusters: header, refcount table, one refcount block, L1 table (all entries empty).
fn encode(base: &[u8], format: Base, size: u64) -> Result<Vec<u8>, Error> {
    if base.len() > MAX_BACKING_NAME {
        return Err(Error::NameTooLong);
    }
    let l1_entries = u32::try_from(size.div_ceil(L1_SPAN)).map_err(|_| Error::TooLarge(size))?;
    if l1_entries > 8192 {
        return Err(Error::TooLarge(size));
    }
    let format: &[u8; 8] = match format {
        Base::Raw => b"raw\0\0\0\0\0",
        Base::Qcow2 => b"qcow2\0\0\0",
    };
    let format_length: u32 = if format.starts_with(b"raw") { 3 } else { 5 };
    let name_offset = u64::from(HEADER_LENGTH) + 8 + 8 + 8; // after the format extension and the end mark
    let name_length = u32::try_from(base.len()).map_err(|_| Error::NameTooLong)?;
    let cluster = 1_u64 << CLUSTER_BITS;

    let mut out = Vec::with_capacity(4 * CLUSTER);
    let be32 = |out: &mut Vec<u8>, value: u32| out.extend_from_slice(&value.to_be_bytes());
    let be64 = |out: &mut Vec<u8>, value: u64| out.extend_from_slice(&value.to_be_bytes());
    out.extend_from_slice(b"QFI\xfb");
    be32(&mut out, 3); // version
    be64(&mut out, name_offset);
    be32(&mut out, name_length);
    be32(&mut out, CLUSTER_BITS);
    be64(&mut out, size);
    be32(&mut out, 0); // no encryption
    be32(&mut out, l1_entries);
    be64(&mut out, 3 * cluster); // L1 table
    be64(&mut out, cluster); // refcount table
    be32(&mut out, 1); // its clusters
    be32(&mut out, 0); // internal snapshots
    be64(&mut out, 0);
    be64(&mut out, 0); // incompatible, compatible, autoclear features
    be64(&mut out, 0);
    be64(&mut out, 0);
    be32(&mut out, 4); // refcounts of 2^4 bits
    be32(&mut out, HEADER_LENGTH);
    be32(&mut out, 0xE279_2ACA); // extension: format of the backing file
    be32(&mut out, format_length);
    out.extend_from_slice(format);
    be64(&mut out, 0); // end of the extensions
    out.extend_from_slice(base);
    out.resize(CLUSTER, 0);
    be64(&mut out, 2 * cluster); // refcount table: its only block
    out.resize(2 * CLUSTER, 0);
    for _ in 0..4 {
        out.extend_from_slice(&1_u16.to_be_bytes()); // these four clusters are in use once
    }
    out.resize(4 * CLUSTER, 0);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn be32(bytes: &[u8], at: usize) -> u32 {
        u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn be64(bytes: &[u8], at: usize) -> u64 {
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn header_fields_are_where_the_format_wants_them() {
        let bytes = encode(b"/base", Base::Raw, 8 << 30).unwrap();
        assert_eq!(&bytes[..4], b"QFI\xfb");
        assert_eq!(be32(&bytes, 4), 3);
        let name = usize::try_from(be64(&bytes, 8)).unwrap();
        assert_eq!(&bytes[name..name + 5], b"/base");
        assert_eq!(be32(&bytes, 16), 5);
        assert_eq!(be64(&bytes, 24), 8 << 30);
        assert_eq!(be32(&bytes, 36), 16);
        assert_eq!(be32(&bytes, 100), HEADER_LENGTH);
        assert_eq!(be32(&bytes, 104), 0xE279_2ACA);
        assert_eq!(&bytes[112..115], b"raw");
    }

    #[test]
    fn every_table_is_counted_and_inside_the_file() {
        let bytes = encode(b"/base", Base::Qcow2, 1 << 30).unwrap();
        let refcounts = usize::try_from(be64(&bytes, 48)).unwrap();
        let block = usize::try_from(be64(&bytes, refcounts)).unwrap();
        assert_eq!(&bytes[block..block + 10], [0, 1, 0, 1, 0, 1, 0, 1, 0, 0]);
        assert!(be64(&bytes, 40) + 65536 <= bytes.len() as u64);
    }

    #[test]
    fn too_large_disks_and_too_long_names_are_refused() {
        assert!(matches!(encode(b"/b", Base::Raw, 5 << 40), Err(Error::TooLarge(_))));
        assert!(matches!(encode(&[b'a'; 1024], Base::Raw, 1), Err(Error::NameTooLong)));
    }
}
