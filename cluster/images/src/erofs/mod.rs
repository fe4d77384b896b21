//! Writes a [`Tree`] as an EROFS image.
//!
//! An own writer, because what we need does not exist: images must be uncompressed, so that a guest can map them from
//! the host's page cache and all guests share one copy; they must be made by a process without privileges, which
//! cannot unpack an archive into a directory with foreign owners and devices first; and they must be the same bytes
//! for the same input. `mkfs.erofs` reads archives only in newer versions than distributions carry.
//!
//! Format: Linux `Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h`. Used of it: 4 KiB blocks, extended
//! inodes (64 bytes, the only ones with a time), attributes behind their inode, file data either in blocks of its own
//! or, when small, behind the inode. Nothing that a kernel since 5.4 cannot read.
//!
//! Layout: superblock at byte 1024, then all inodes from the root on, then blocks of directories and files in the same
//! order. Regular files get whole blocks unless they are small: only whole blocks can be mapped by a guest directly.

mod encode;
#[cfg(test)]
pub(crate) mod reader;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::limits::{Budget, LimitReached};
use crate::spool::{Spool, SpoolError};
use crate::tree::{Kind, Node, NodeId, Tree};
use encode::{BLOCK, DirEntry, INODE, Record, SUPERBLOCK_AT, SUPERBLOCK_END};

const BLOCK_BYTES: u64 = 4096;
/// Inodes begin at multiples of this; an inode's number is its position divided by it (`EROFS_ISLOTBITS`).
const SLOT: u64 = 32;
/// Regular files up to this size lie behind their inodes: in a block of their own more than half would be lost.
const SMALL_FILE_MAX: u64 = 2048;

/// Why an image cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// The image file cannot be written.
    #[error("writing the image")]
    Write(#[source] io::Error),
    /// Contents of a file cannot be read back.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The image would be too large.
    #[error(transparent)]
    Limit(#[from] LimitReached),
    /// Sizes do not add up: a fault of this program.
    #[error("the image's layout contradicts itself at byte {0}")]
    Layout(u64),
}

/// A finished image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// SHA-256 of all bytes.
    pub sha256: [u8; 32],
    /// Length in bytes, a multiple of 4096.
    pub bytes: u64,
    /// Number of files, directories and so on.
    pub inodes: u64,
}

/// Where the parts of one inode lie.
struct Placed<'a> {
    node: &'a Node,
    /// Index of the directory it was found in first.
    parent: usize,
    links: u32,
    /// Encoded attributes with their header; empty if there are none.
    xattrs: Vec<u8>,
    /// Length of its data in bytes.
    size: u64,
    /// How much of the data lies behind the inode.
    inline: u64,
    position: u64,
    /// First block of the rest of the data.
    block: u64,
}

impl Placed<'_> {
    fn blocks(&self) -> u64 {
        (self.size - self.inline).div_ceil(BLOCK_BYTES)
    }

    fn nid(&self) -> u64 {
        self.position / SLOT
    }
}

/// Writes `tree` to `out`, at most `bytes_max` bytes.
///
/// # Errors
/// See [`ErofsError`].
pub fn write(tree: &Tree, spool: &Spool, bytes_max: u64, out: &mut dyn Write) -> Result<Written, ErofsError> {
    let image = Image::lay_out(tree, bytes_max)?;
    let mut sink = Sink { out, hash: Sha256::new(), first: vec![], position: 0 };
    sink.pad_to(SUPERBLOCK_AT)?;
    let inodes = u64::try_from(image.inodes.len()).unwrap_or(u64::MAX);
    let root = image.inodes.first().map_or(0, Placed::nid);
    sink.write(&encode::superblock(root, inodes, image.blocks))?;
    for (number, inode) in (1..).zip(&image.inodes) {
        sink.pad_to(inode.position)?;
        sink.write(&encode::inode(&record(inode, number)))?;
        sink.write(&inode.xattrs)?;
        if inode.inline > 0 {
            image.write_data(inode, inode.size - inode.inline..inode.size, spool, &mut sink)?;
        }
    }
    for inode in image.inodes.iter().filter(|inode| inode.blocks() > 0) {
        sink.pad_to(inode.block * BLOCK_BYTES)?;
        image.write_data(inode, 0..inode.size - inode.inline, spool, &mut sink)?;
    }
    let bytes = image.blocks * BLOCK_BYTES;
    sink.pad_to(bytes)?;
    sink.out.flush().map_err(ErofsError::Write)?;
    Ok(Written { sha256: sink.hash.finalize().into(), bytes, inodes })
}

fn record(inode: &Placed<'_>, number: u32) -> Record {
    let (kind, special) = match &inode.node.kind {
        Kind::Directory(_) => (encode::DIRECTORY, None),
        Kind::File(_) => (encode::FILE, None),
        Kind::Symlink(_) => (encode::SYMLINK, None),
        Kind::Character(major, minor) => (encode::CHARACTER, Some(encode::device(*major, *minor))),
        Kind::Block(major, minor) => (encode::BLOCK_DEVICE, Some(encode::device(*major, *minor))),
        Kind::Fifo => (encode::FIFO, None),
    };
    // Block numbers were checked to fit when the image was laid out.
    let block = if inode.blocks() > 0 { u32::try_from(inode.block).unwrap_or(u32::MAX) } else { 0 };
    let meta = &inode.node.meta;
    Record {
        kind,
        inline: inode.inline > 0,
        xattrs: inode.xattrs.len(),
        mode: meta.mode,
        size: inode.size,
        place: special.unwrap_or(block),
        number,
        uid: meta.uid,
        gid: meta.gid,
        mtime: meta.mtime,
        mtime_nanos: meta.mtime_nanos,
        links: inode.links,
    }
}

struct Image<'a> {
    inodes: Vec<Placed<'a>>,
    /// Index of each node's inode.
    indices: BTreeMap<NodeId, usize>,
    blocks: u64,
}

impl<'a> Image<'a> {
    fn lay_out(tree: &'a Tree, bytes_max: u64) -> Result<Self, ErofsError> {
        let mut image = Self { inodes: vec![], indices: BTreeMap::new(), blocks: 0 };
        image.collect(tree);
        let mut position = SUPERBLOCK_END;
        for inode in &mut image.inodes {
            position = place(inode, position);
            inode.position = position;
            position += INODE + length(&inode.xattrs) + inode.inline;
        }
        let mut block = position.div_ceil(BLOCK_BYTES);
        for inode in &mut image.inodes {
            inode.block = block;
            block = block.saturating_add(inode.blocks());
        }
        // A block number has 32 bits; the highest is reserved.
        let most = (bytes_max / BLOCK_BYTES).min(u64::from(u32::MAX - 1));
        Budget::new("blocks of 4096 bytes in the image", most).take(block)?;
        image.blocks = block;
        Ok(image)
    }

    /// Lists all inodes, directory by directory, and counts their names.
    fn collect(&mut self, tree: &'a Tree) {
        self.add(tree, tree.root(), 0);
        let mut next = 0;
        while let Some(directory) = self.inodes.get(next) {
            if let Kind::Directory(children) = &directory.node.kind {
                for id in children.values() {
                    if let Some(known) = self.indices.get(id).and_then(|index| self.inodes.get_mut(*index)) {
                        known.links += 1;
                    } else if self.add(tree, *id, next)
                        && let Some(parent) = self.inodes.get_mut(next)
                    {
                        parent.links += 1;
                    }
                }
            }
            next += 1;
        }
    }

    /// Adds one inode; true if it is a directory, whose `..` is one more name of its parent.
    fn add(&mut self, tree: &'a Tree, id: NodeId, parent: usize) -> bool {
        let Some(node) = tree.node(id) else { return false };
        let is_directory = matches!(node.kind, Kind::Directory(_));
        let size = match &node.kind {
            Kind::Directory(children) => encode::directory_size(&names(children)),
            Kind::File(contents) => contents.length,
            Kind::Symlink(target) => length(target),
            Kind::Character(..) | Kind::Block(..) | Kind::Fifo => 0,
        };
        let xattrs = encode::xattrs(&node.meta.xattrs);
        let tail = size % BLOCK_BYTES;
        let may = !matches!(node.kind, Kind::File(_)) || size <= SMALL_FILE_MAX;
        let fits = INODE + length(&xattrs) + tail <= BLOCK_BYTES;
        let inline = if may && fits { tail } else { 0 };
        self.indices.insert(id, self.inodes.len());
        let links = if is_directory { 2 } else { 1 };
        self.inodes.push(Placed { node, parent, links, xattrs, size, inline, position: 0, block: 0 });
        is_directory
    }

    /// Writes a part of an inode's data.
    fn write_data(
        &self,
        inode: &Placed<'_>,
        part: Range<u64>,
        spool: &Spool,
        sink: &mut Sink<'_>,
    ) -> Result<(), ErofsError> {
        let at = sink.position;
        let outside = || ErofsError::Layout(at);
        let range = usize::try_from(part.start).ok().zip(usize::try_from(part.end).ok());
        match &inode.node.kind {
            Kind::Directory(children) => {
                let bytes = encode::directory(&self.entries(inode, children));
                let bytes = range.and_then(|(from, end)| bytes.get(from..end)).ok_or_else(outside)?;
                sink.write(bytes)
            }
            Kind::Symlink(target) => {
                sink.write(range.and_then(|(from, end)| target.get(from..end)).ok_or_else(outside)?)
            }
            Kind::File(contents) => {
                let mut buffer = vec![0; 128 << 10];
                let mut position = part.start;
                while position < part.end {
                    let count = usize::try_from(part.end - position).unwrap_or(usize::MAX).min(buffer.len());
                    let part = buffer.get_mut(..count).ok_or_else(outside)?;
                    spool.read(*contents, position, part)?;
                    sink.write(part)?;
                    position += length(part);
                }
                Ok(())
            }
            Kind::Character(..) | Kind::Block(..) | Kind::Fifo => Ok(()),
        }
    }

    /// The entries of a directory in the order of their bytes, `.` and `..` among them.
    fn entries<'n>(&self, inode: &Placed<'_>, children: &'n BTreeMap<Vec<u8>, NodeId>) -> Vec<DirEntry<'n>> {
        let parent = self.inodes.get(inode.parent).map_or(0, Placed::nid);
        let mut entries = vec![
            DirEntry { name: b".", nid: inode.nid(), kind: encode::DIRECTORY },
            DirEntry { name: b"..", nid: parent, kind: encode::DIRECTORY },
        ];
        for (name, id) in children {
            if let Some(child) = self.indices.get(id).and_then(|index| self.inodes.get(*index)) {
                entries.push(DirEntry { name, nid: child.nid(), kind: record(child, 0).kind });
            }
        }
        entries.sort_unstable_by_key(|entry| entry.name);
        entries
    }
}

fn names(children: &BTreeMap<Vec<u8>, NodeId>) -> Vec<&[u8]> {
    let mut names: Vec<&[u8]> = children.keys().map(Vec::as_slice).chain([b".".as_slice(), b".."]).collect();
    names.sort_unstable();
    names
}

/// The first position from `position` on where an inode may lie: at a slot, not across a block's end, and so that the
/// data behind it lies in one block (the kernel maps it as one).
fn place(inode: &Placed<'_>, position: u64) -> u64 {
    let position = position.next_multiple_of(SLOT);
    let next_block = position.next_multiple_of(BLOCK_BYTES);
    let tail = position + INODE + length(&inode.xattrs);
    let head_fits = position % BLOCK_BYTES + INODE <= BLOCK_BYTES;
    let tail_fits = inode.inline == 0 || tail % BLOCK_BYTES + inode.inline <= BLOCK_BYTES;
    if head_fits && tail_fits { position } else { next_block }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// Takes the bytes of the image in order. The first block is held back until it is complete: the superblock's
/// checksum covers it.
struct Sink<'a> {
    out: &'a mut dyn Write,
    hash: Sha256,
    first: Vec<u8>,
    position: u64,
}

impl Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), ErofsError> {
        let missing = BLOCK.saturating_sub(usize::try_from(self.position).unwrap_or(BLOCK));
        self.position += length(bytes);
        let (held, rest) = bytes.split_at(missing.min(bytes.len()));
        self.first.extend(held);
        if !held.is_empty() && self.first.len() == BLOCK {
            encode::seal(&mut self.first);
            let first = std::mem::take(&mut self.first);
            self.pass(&first)?;
        }
        self.pass(rest)
    }

    fn pass(&mut self, bytes: &[u8]) -> Result<(), ErofsError> {
        self.hash.update(bytes);
        self.out.write_all(bytes).map_err(ErofsError::Write)
    }

    fn pad_to(&mut self, position: u64) -> Result<(), ErofsError> {
        let missing = position.checked_sub(self.position).ok_or(ErofsError::Layout(self.position))?;
        // Never more than a block: everything lies as close to what is before it as blocks allow.
        let zeros = [0; BLOCK];
        let count = usize::try_from(missing).unwrap_or(usize::MAX);
        let zeros = zeros.get(..count).ok_or(ErofsError::Layout(self.position))?;
        self.write(zeros)
    }
}
