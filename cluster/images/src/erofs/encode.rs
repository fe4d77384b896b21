//! The structures of EROFS as bytes (Linux `fs/erofs/erofs_fs.h`; everything little-endian).

use std::collections::BTreeMap;

/// Block size in bytes.
pub const BLOCK: usize = 4096;
/// Length of an extended inode.
pub const INODE: u64 = 64;
/// Where the superblock begins (`EROFS_SUPER_OFFSET`).
pub const SUPERBLOCK_AT: u64 = 1024;
/// Where it ends.
pub const SUPERBLOCK_END: u64 = SUPERBLOCK_AT + 128;
const MAGIC: u32 = 0xE0F5_E1E2;
/// `EROFS_FEATURE_COMPAT_SB_CHKSUM | EROFS_FEATURE_COMPAT_MTIME`
const FEATURES: u32 = 1 | 2;
const BLOCK_BITS: u8 = 12;
/// Length of `erofs_dirent`.
const DIRENT: usize = 12;

/// File types as `(S_IFMT bits of stat(2), EROFS_FT_*)`.
pub type FileKind = (u16, u8);
/// A regular file.
pub const FILE: FileKind = (0o100_000, 1);
/// A directory.
pub const DIRECTORY: FileKind = (0o040_000, 2);
/// A character device.
pub const CHARACTER: FileKind = (0o020_000, 3);
/// A block device.
pub const BLOCK_DEVICE: FileKind = (0o060_000, 4);
/// A named pipe.
pub const FIFO: FileKind = (0o010_000, 5);
/// A symbolic link.
pub const SYMLINK: FileKind = (0o120_000, 7);

/// The superblock without its checksum. All inodes are counted from the start of the image (`meta_blkaddr` 0), and the
/// root's inode is the first, so that its number fits.
pub fn superblock(root_nid: u64, inodes: u64, blocks: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend([0; 4]); // checksum
    bytes.extend(FEATURES.to_le_bytes());
    bytes.extend([BLOCK_BITS, 0]); // no extension slots
    bytes.extend(u16::try_from(root_nid).unwrap_or(u16::MAX).to_le_bytes());
    bytes.extend(inodes.to_le_bytes());
    bytes.extend([0; 12]); // build time: the same input shall give the same bytes
    bytes.extend(u32::try_from(blocks).unwrap_or(u32::MAX).to_le_bytes());
    bytes.resize(128, 0);
    bytes
}

/// Sets the checksum in the first block of an image.
pub fn seal(block: &mut [u8]) {
    let start = usize::try_from(SUPERBLOCK_AT).unwrap_or(0);
    let checksum = crc32c(block.get(start..).unwrap_or(&[])).to_le_bytes();
    if let Some(field) = block.get_mut(start + 4..start + 8) {
        field.copy_from_slice(&checksum);
    }
}

/// CRC-32C (RFC 3720, appendix B.4) without the final inversion, as the kernel's `crc32c(~0, …)`. One bit at a time:
/// it is used for 3 KiB per image.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| {
                if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 }
            },
        )
    })
}

/// What an inode says.
pub struct Record {
    /// File type.
    pub kind: FileKind,
    /// The end of the data lies behind the inode.
    pub inline: bool,
    /// Length of the attributes behind the inode, in bytes.
    pub xattrs: usize,
    /// Permission bits.
    pub mode: u16,
    /// Length of the data in bytes.
    pub size: u64,
    /// First block of the data, or the device number.
    pub place: u32,
    /// Number for `stat`, counted from 1.
    pub number: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds to it.
    pub mtime_nanos: u32,
    /// Number of names.
    pub links: u32,
}

/// An extended inode.
pub fn inode(record: &Record) -> Vec<u8> {
    const EXTENDED: u16 = 1;
    const FLAT_INLINE: u16 = 2 << 1;
    let format = EXTENDED | if record.inline { FLAT_INLINE } else { 0 };
    // One for the header of 12 bytes, then one for each 4 bytes.
    let xattr_count = if record.xattrs == 0 { 0 } else { (record.xattrs - XATTR_HEADER) / 4 + 1 };
    let mut bytes = Vec::with_capacity(64);
    bytes.extend(format.to_le_bytes());
    bytes.extend(u16::try_from(xattr_count).unwrap_or(u16::MAX).to_le_bytes());
    bytes.extend((record.kind.0 | record.mode).to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(record.size.to_le_bytes());
    bytes.extend(record.place.to_le_bytes());
    bytes.extend(record.number.to_le_bytes());
    bytes.extend(record.uid.to_le_bytes());
    bytes.extend(record.gid.to_le_bytes());
    bytes.extend(record.mtime.to_le_bytes());
    bytes.extend(record.mtime_nanos.to_le_bytes());
    bytes.extend(record.links.to_le_bytes());
    bytes.resize(64, 0);
    bytes
}

/// A device number as `new_encode_dev` makes it (include/linux/kdev_t.h).
pub fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Length of `erofs_xattr_ibody_header`.
const XATTR_HEADER: usize = 12;

/// Attributes with their header; nothing if there are none. Lengths were checked when they were put into the tree.
pub fn xattrs(attributes: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    if attributes.is_empty() {
        return vec![];
    }
    // No shared attributes, and a name filter of 0: any name may be there.
    let mut bytes = vec![0; XATTR_HEADER];
    for (name, value) in attributes {
        let (index, rest) = xattr_name(name);
        bytes.push(u8::try_from(rest.len()).unwrap_or(u8::MAX));
        bytes.push(index);
        bytes.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend(rest);
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Prefixes that are written as a number (`EROFS_XATTR_INDEX_*`).
pub const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

fn xattr_name(name: &[u8]) -> (u8, &[u8]) {
    let found = XATTR_PREFIXES.iter().find_map(|(index, prefix)| Some((*index, name.strip_prefix(*prefix)?)));
    // Others were dropped when the layer was applied.
    found.unwrap_or((0, name))
}

/// One entry of a directory.
pub struct DirEntry<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// Number of its inode.
    pub nid: u64,
    /// File type.
    pub kind: FileKind,
}

/// How many of the entries with these names, which are in order, go into one block.
fn fitting<'a>(names: impl Iterator<Item = &'a [u8]>) -> (usize, usize) {
    let (mut count, mut used) = (0, 0);
    for name in names {
        let more = used + DIRENT + name.len();
        if more > BLOCK {
            break;
        }
        (count, used) = (count + 1, more);
    }
    (count, used)
}

/// Length in bytes of a directory with these names.
pub fn directory_size(mut names: &[&[u8]]) -> u64 {
    let mut blocks: u64 = 0;
    loop {
        let (count, used) = fitting(names.iter().copied());
        names = names.get(count.max(1)..).unwrap_or(&[]);
        if names.is_empty() {
            return blocks * 4096 + u64::try_from(used).unwrap_or(0);
        }
        blocks += 1;
    }
}

/// The data of a directory: in each block the entries, then their names. The last block is as long as it has to be.
pub fn directory(mut entries: &[DirEntry<'_>]) -> Vec<u8> {
    let mut bytes = vec![];
    while !entries.is_empty() {
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        let (count, _) = fitting(entries.iter().map(|entry| entry.name));
        let (block, rest) = entries.split_at(count.max(1).min(entries.len()));
        entries = rest;
        let mut name_at = block.len() * DIRENT;
        for entry in block {
            bytes.extend(entry.nid.to_le_bytes());
            bytes.extend(u16::try_from(name_at).unwrap_or(u16::MAX).to_le_bytes());
            bytes.extend([entry.kind.1, 0]);
            name_at += entry.name.len();
        }
        for entry in block {
            bytes.extend(entry.name);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc32c() {
        // The check value of CRC-32C, before its final inversion.
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn device_numbers_are_those_of_the_kernel() {
        assert_eq!(device(5, 1), 0x501);
        assert_eq!(device(0x123, 0x45678), 0x4561_2378);
    }
}
