//! Reads tar archives: POSIX ustar with pax headers (IEEE 1003.1-2017, utility `pax`, "Extended Header" and "ustar
//! Interchange Format") and what GNU tar adds (its manual, "Basic Tar Format").
//!
//! An own reader, because the archive is hostile and lies in a file already: names, attributes and headers are bounded
//! before they are read, contents are never read at all but noted by position, and each error names its entry.

use std::collections::BTreeMap;

use crate::spool::{Region, Spool, SpoolError};

const BLOCK: usize = 512;
const BLOCK_BYTES: u64 = 512;
/// Most bytes of a pax header or a GNU long name: some attributes of 64 KiB each.
const EXTRA_MAX: u64 = 1 << 20;
/// Longest path in bytes (`PATH_MAX` of limits.h).
const PATH_MAX: usize = 4096;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file with these contents.
    File(Region),
    /// Another name of an earlier entry.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device with major and minor number.
    Character(u32, u32),
    /// A block device with major and minor number.
    Block(u32, u32),
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// Owner, permissions, time and attributes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with set-uid, set-gid and sticky: at most 0o7777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970 of the last change of contents.
    pub mtime: i64,
    /// Nanoseconds to it.
    pub mtime_nanos: u32,
    /// Extended attributes by full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its path as it is in the archive.
    pub path: Vec<u8>,
    /// Where a link points to.
    pub target: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Owner and so on.
    pub meta: Meta,
}

/// A name for a message: bytes that are no UTF-8 are replaced, control characters escaped, long names cut.
pub fn shown(name: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(name).chars().take(200).collect();
    text.escape_debug().to_string()
}

/// Why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The first block is no tar header.
    #[error("this is no tar archive (nor one that is compressed with gzip, zstd or xz)")]
    NotATar,
    /// The archive ends where more must follow.
    #[error("the archive is truncated {}", place(.after))]
    Truncated {
        /// The entry that is not complete, or the last one that is; empty at the start.
        after: String,
    },
    /// A header cannot be read.
    #[error("the archive is damaged {}: {problem}", place(.after))]
    Damaged {
        /// The entry it belongs to, or the one before; empty at the start.
        after: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// The entry needs what is not supported.
    #[error("entry \"{entry}\": {feature} are not supported")]
    Unsupported {
        /// Which entry.
        entry: String,
        /// What it needs.
        feature: &'static str,
    },
    /// The spool file cannot be read.
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

fn place(after: &str) -> String {
    if after.is_empty() { "at its start".into() } else { format!("at entry \"{after}\"") }
}

/// Values of the headers that stand before an entry's own.
#[derive(Default)]
struct Before {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Reads the entries of an archive one by one.
pub struct Archive<'a> {
    spool: &'a Spool,
    region: Region,
    position: u64,
    last: String,
    /// The archive must have its end mark: nothing else tells that it is complete.
    strict_end: bool,
    done: bool,
}

impl<'a> Archive<'a> {
    /// An archive that must have an end mark.
    pub fn new(spool: &'a Spool, region: Region) -> Self {
        Self { spool, region, position: 0, last: String::new(), strict_end: true, done: false }
    }

    /// An archive whose digest was checked: an end mark that its maker left out is not missed.
    pub fn verified(spool: &'a Spool, region: Region) -> Self {
        Self { strict_end: false, ..Self::new(spool, region) }
    }

    fn truncated(&self) -> TarError {
        TarError::Truncated { after: self.last.clone() }
    }

    fn damaged(&self, problem: &'static str) -> TarError {
        TarError::Damaged { after: self.last.clone(), problem }
    }

    /// The next entry; `None` at the end.
    ///
    /// # Errors
    /// The archive is not one, is cut off, or holds what is not supported.
    pub fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut before = Before::default();
        while let Some(header) = self.header()? {
            let size = self.number(&header, 124, 12)?;
            match header.get(156).copied().unwrap_or(0) {
                b'x' => {
                    let bytes = self.extra(size)?;
                    self.pax(&bytes, &mut before)?;
                }
                b'L' => before.path = Some(until_nul(&self.extra(size)?).to_vec()),
                b'K' => before.target = Some(until_nul(&self.extra(size)?).to_vec()),
                // A pax header for all entries: archivers write comments there (git, the commit). A GNU volume label.
                b'g' | b'V' => {
                    self.contents(size)?;
                }
                kind => return self.entry(&header, kind, size, before).map(Some),
            }
        }
        Ok(None)
    }

    /// The next header block; `None` at the end.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let left = self.region.length - self.position;
        if self.done || (left == 0 && !self.strict_end) {
            return Ok(None);
        }
        if left < BLOCK_BYTES {
            return Err(if self.position == 0 { TarError::NotATar } else { self.truncated() });
        }
        let mut block = [0; BLOCK];
        self.spool.read(self.region, self.position, &mut block)?;
        if block.iter().all(|byte| *byte == 0) {
            self.done = true;
            return Ok(None);
        }
        // The checksum counts its own field as spaces.
        let own = 148..156;
        let sum = |value: fn(u8) -> i64| -> i64 {
            block.iter().enumerate().map(|(i, b)| value(if own.contains(&i) { b' ' } else { *b })).sum()
        };
        let told = self.number(&block, 148, 8).ok().and_then(|told| i64::try_from(told).ok());
        if told != Some(sum(i64::from)) && told != Some(sum(|byte| i64::from(byte.cast_signed()))) {
            return Err(if self.position == 0 { TarError::NotATar } else { self.damaged("wrong checksum") });
        }
        self.position += BLOCK_BYTES;
        Ok(Some(block))
    }

    /// Steps over contents of `size` bytes and their padding.
    fn contents(&mut self, size: u64) -> Result<Region, TarError> {
        let region = self.region.part(self.position, size).ok_or_else(|| self.truncated())?;
        let padded = size.checked_next_multiple_of(BLOCK_BYTES).ok_or_else(|| self.truncated())?;
        // Padding that is missing at the very end takes nothing away.
        self.position = (self.position + padded).min(self.region.length);
        Ok(region)
    }

    fn extra(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > EXTRA_MAX {
            return Err(self.damaged("an extended header of more than 1 MiB"));
        }
        let region = self.contents(size)?;
        Ok(self.spool.bytes(region, EXTRA_MAX, "bytes of an extended header")?)
    }

    /// A number field: octal digits, or big-endian binary if the first bit is set.
    fn number(&self, block: &[u8; BLOCK], at: usize, length: usize) -> Result<u64, TarError> {
        let wrong = || self.damaged("a number that is none");
        let field = block.get(at..at + length).ok_or_else(wrong)?;
        if let [first, rest @ ..] = field
            && first & 0x80 != 0
        {
            return rest.iter().try_fold(u64::from(first & 0x7f), |value, byte| {
                value.checked_mul(256).map(|value| value | u64::from(*byte)).ok_or_else(wrong)
            });
        }
        let text = field.trim_ascii_start();
        let end = text.iter().position(|byte| matches!(byte, 0 | b' ')).unwrap_or(text.len());
        text.iter().take(end).try_fold(0u64, |value, byte| match byte {
            b'0'..=b'7' => value.checked_mul(8).map(|value| value | u64::from(byte - b'0')).ok_or_else(wrong),
            _ => Err(wrong()),
        })
    }

    fn pax(&self, mut records: &[u8], before: &mut Before) -> Result<(), TarError> {
        let wrong = || self.damaged("an extended header that cannot be read");
        while !records.is_empty() {
            let space = records.iter().position(|byte| *byte == b' ').ok_or_else(wrong)?;
            let length: usize = parse(records.get(..space).unwrap_or(&[])).ok_or_else(wrong)?;
            let record = records.get(space + 1..length).ok_or_else(wrong)?;
            let record = record.strip_suffix(b"\n").ok_or_else(wrong)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
            let (key, value) = record.split_at(equals);
            let value = value.strip_prefix(b"=").unwrap_or(value);
            match key {
                b"path" => before.path = Some(value.to_vec()),
                b"linkpath" => before.target = Some(value.to_vec()),
                b"size" => before.size = Some(parse(value).ok_or_else(wrong)?),
                b"uid" => before.uid = Some(parse(value).ok_or_else(wrong)?),
                b"gid" => before.gid = Some(parse(value).ok_or_else(wrong)?),
                b"mtime" => before.mtime = Some(time(value).ok_or_else(wrong)?),
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        before.xattrs.insert(name.to_vec(), value.to_vec());
                    } else if key.starts_with(b"GNU.sparse.") {
                        let entry = before.path.as_deref().map_or_else(|| self.last.clone(), shown);
                        return Err(TarError::Unsupported { entry, feature: "sparse files" });
                    }
                }
            }
            records = records.get(length..).ok_or_else(wrong)?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        header: &[u8; BLOCK],
        kind: u8,
        size: u64,
        before: Before,
    ) -> Result<Entry, TarError> {
        let path = before.path.unwrap_or_else(|| header_path(header));
        let target = before.target.unwrap_or_else(|| field(header, 157, 100).to_vec());
        self.last = shown(&path);
        for name in [&path, &target] {
            if name.len() > PATH_MAX {
                return Err(self.damaged("a name of more than 4096 bytes"));
            }
            if name.contains(&0) {
                return Err(self.damaged("a name with a NUL byte"));
            }
        }
        let size = before.size.unwrap_or(size);
        let small =
            |this: &Self, at| this.number(header, at, 8).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        // The kernel has 12 bits for the major and 20 for the minor number (include/linux/kdev_t.h).
        let device = |this: &Self| match (small(this, 329)?, small(this, 337)?) {
            (major @ 0..=0xfff, minor @ 0..=0xf_ffff) => Ok((major, minor)),
            _ => Err(this.damaged("a device number that is out of range")),
        };
        let kind = match kind {
            // A file of the oldest format whose name ends in a slash is a directory.
            0 if path.ends_with(b"/") => EntryKind::Directory,
            0 | b'0' | b'7' => EntryKind::File(self.contents(size)?),
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => device(self).map(|(major, minor)| EntryKind::Character(major, minor))?,
            b'4' => device(self).map(|(major, minor)| EntryKind::Block(major, minor))?,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            b'S' => return Err(TarError::Unsupported { entry: shown(&path), feature: "sparse files" }),
            b'M' => {
                return Err(TarError::Unsupported {
                    entry: shown(&path),
                    feature: "archives of several volumes",
                });
            }
            _ => return Err(TarError::Unsupported { entry: shown(&path), feature: "entries of this kind" }),
        };
        let (mtime, mtime_nanos) = match before.mtime {
            Some(time) => time,
            // Times before 1970 in GNU's binary form count as 1970: they are not worth refusing an archive.
            None => (self.number(header, 136, 12).map_or(0, |n| i64::try_from(n).unwrap_or(0)), 0),
        };
        let (uid, gid) = (
            before.uid.map_or_else(|| small(self, 108), Ok)?,
            before.gid.map_or_else(|| small(self, 116), Ok)?,
        );
        if uid == u32::MAX || gid == u32::MAX {
            return Err(self.damaged("an owner that is out of range"));
        }
        let meta = Meta {
            mode: u16::try_from(self.number(header, 100, 8)? & 0o7777).unwrap_or(0),
            uid,
            gid,
            mtime,
            mtime_nanos,
            xattrs: before.xattrs,
        };
        Ok(Entry { path, target, kind, meta })
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or(&[])
}

fn field(block: &[u8; BLOCK], at: usize, length: usize) -> &[u8] {
    until_nul(block.get(at..at + length).unwrap_or(&[]))
}

fn header_path(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = field(header, 0, 100);
    // GNU tar uses the place of the prefix for other things; its magic number is another one.
    let prefix = if header.get(257..263) == Some(b"ustar\0") { field(header, 345, 155) } else { &[] };
    if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
}

fn parse<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with a fraction, such as `1350244992.023960108`, rounded down as POSIX asks.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u32 = digits.parse().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()))?;
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}
