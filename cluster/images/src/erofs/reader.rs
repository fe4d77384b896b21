//! A small reader of EROFS images for tests, written from the format and not from the writer. It checks what the
//! kernel relies on.

use std::collections::{BTreeMap, BTreeSet};

/// What a path leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub nid: u64,
    /// Type and permissions as in stat(2).
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub links: u32,
    pub rdev: u32,
    /// Contents of a file or target of a link.
    pub data: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The data does not lie in whole blocks.
    pub inline: bool,
}

fn le(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn le32(bytes: &[u8]) -> u32 {
    u32::try_from(le(bytes)).unwrap()
}

struct Image<'a>(&'a [u8]);

/// All paths of an image; the root is the empty one.
pub fn read(image: &[u8]) -> BTreeMap<Vec<u8>, Found> {
    let superblock = &image[1024..1152];
    assert_eq!(le(&superblock[..4]), 0xE0F5_E1E2);
    assert_eq!(superblock[12], 12, "4 KiB blocks");
    assert_eq!(le(&superblock[36..40]) * 4096, image.len() as u64, "number of blocks");
    assert_eq!(le(&superblock[40..44]), 0, "inodes are counted from the start");
    assert_eq!(le(&superblock[80..84]), 0, "no incompatible features");
    let root = le(&superblock[14..16]);
    let mut paths = BTreeMap::new();
    let mut nids = BTreeSet::new();
    let image = Image(image);
    let mut todo = vec![(vec![], root, root)];
    while let Some((path, nid, parent)) = todo.pop() {
        let found = image.inode(nid);
        nids.insert(nid);
        if found.mode & 0o170_000 == 0o040_000 {
            let mut previous: Option<Vec<u8>> = None;
            let mut subdirectories = 0;
            for (name, child, kind) in image.directory(&found.data) {
                assert!(previous.as_ref().is_none_or(|previous| *previous < name), "entries are in order");
                previous = Some(name.clone());
                if name == b"." {
                    assert_eq!(child, nid);
                } else if name == b".." {
                    assert_eq!(child, parent);
                } else {
                    let kinds = [0, 0o010, 0o004, 0o002, 0o006, 0o001, 0o014, 0o012];
                    let mode = image.inode(child).mode >> 12;
                    let expected =
                        kinds.iter().position(|k: &u16| *k == mode).map(|at| [0, 1, 2, 3, 4, 5, 6, 7][at]);
                    assert_eq!(Some(usize::from(kind)), expected, "type of {name:?}");
                    subdirectories += u32::from(kind == 2);
                    let path = if path.is_empty() { name } else { [path.as_slice(), b"/", &name].concat() };
                    todo.push((path, child, nid));
                }
            }
            assert_eq!(found.links, 2 + subdirectories, "links of directory {path:?}");
        }
        paths.insert(path, found);
    }
    assert_eq!(le(&superblock[16..24]), nids.len() as u64, "number of inodes");
    for found in paths.values().filter(|found| found.mode & 0o170_000 != 0o040_000) {
        let names = paths.values().filter(|other| other.nid == found.nid).count();
        assert_eq!(found.links as usize, names, "links");
    }
    paths
}

impl Image<'_> {
    fn inode(&self, nid: u64) -> Found {
        let at = usize::try_from(nid * 32).unwrap();
        assert!(at % 4096 + 64 <= 4096, "an inode lies in one block");
        let inode = &self.0[at..at + 64];
        let format = le(&inode[..2]);
        assert_eq!(format & 1, 1, "an extended inode");
        let inline = match format >> 1 {
            0 => false,
            2 => true,
            other => panic!("layout {other}"),
        };
        let xattr_count = usize::try_from(le(&inode[2..4])).unwrap();
        let xattrs_length = if xattr_count == 0 { 0 } else { 12 + (xattr_count - 1) * 4 };
        let size = usize::try_from(le(&inode[8..16])).unwrap();
        let (mode, place) = (u16::try_from(le(&inode[4..6])).unwrap(), le32(&inode[16..20]));
        let mut data = vec![];
        let has_data = [0o100_000, 0o040_000, 0o120_000].contains(&(mode & 0o170_000));
        if has_data {
            let tail = if inline { size % 4096 } else { 0 };
            let start = usize::try_from(place).unwrap() * 4096;
            data.extend(&self.0[start..start + size - tail]);
            if inline {
                assert!(tail > 0, "something lies behind the inode");
                let start = at + 64 + xattrs_length;
                assert_eq!(
                    start / 4096,
                    (start + tail - 1) / 4096,
                    "what lies behind an inode lies in one block"
                );
                data.extend(&self.0[start..start + tail]);
            }
        } else {
            assert_eq!(size, 0);
        }
        Found {
            nid,
            mode,
            uid: le32(&inode[24..28]),
            gid: le32(&inode[28..32]),
            mtime: (i64::from_le_bytes(inode[32..40].try_into().unwrap()), le32(&inode[40..44])),
            links: le32(&inode[44..48]),
            rdev: if has_data { 0 } else { place },
            data,
            xattrs: self.xattrs(at + 64, xattrs_length),
            inline,
        }
    }

    fn xattrs(&self, at: usize, length: usize) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut found = BTreeMap::new();
        if length == 0 {
            return found;
        }
        let mut bytes = &self.0[at + 12..at + length];
        assert_eq!(self.0[at + 4], 0, "no shared attributes");
        while !bytes.is_empty() {
            let (name_length, value_length) =
                (usize::from(bytes[0]), usize::try_from(le(&bytes[2..4])).unwrap());
            let prefix = match bytes[1] {
                1 => "user.",
                2 => "system.posix_acl_access",
                3 => "system.posix_acl_default",
                4 => "trusted.",
                6 => "security.",
                other => panic!("name index {other}"),
            };
            let name = [prefix.as_bytes(), &bytes[4..4 + name_length]].concat();
            let value = bytes[4 + name_length..4 + name_length + value_length].to_vec();
            assert!(found.insert(name, value).is_none());
            bytes = &bytes[(4 + name_length + value_length).next_multiple_of(4)..];
        }
        found
    }

    fn directory(&self, data: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
        let mut entries = vec![];
        for block in data.chunks(4096) {
            let names_at = usize::try_from(le(&block[8..10])).unwrap();
            assert!(names_at % 12 == 0 && names_at > 0);
            for at in (0..names_at).step_by(12) {
                let start = usize::try_from(le(&block[at + 8..at + 10])).unwrap();
                let end = match at + 12 {
                    next if next < names_at => usize::try_from(le(&block[next + 8..next + 10])).unwrap(),
                    _ => {
                        start
                            + block[start..].iter().position(|byte| *byte == 0).unwrap_or(block.len() - start)
                    }
                };
                entries.push((block[start..end].to_vec(), le(&block[at..at + 8]), block[at + 10]));
            }
        }
        entries
    }
}
