//! Applies an archive to a tree: a plain root file system, or a layer of an OCI image with its whiteouts
//! (OCI image specification, layer.md, "Whiteouts").

use std::collections::BTreeMap;

use crate::spool::{Region, Spool};
use crate::tar::{Archive, Entry, EntryKind, Meta, TarError};
use crate::tree::{Kind, Tree, TreeError};

/// A name that begins so stands for the removal of the rest of the name from the layers below.
const WHITEOUT: &[u8] = b".wh.";
/// A file of this name removes what the layers below have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names that begin so are bookkeeping of the union file system that whiteouts come from.
const BOOKKEEPING: &[u8] = b".wh..wh.";
/// Attributes that Linux file systems can hold begin so, with a name behind it, or are access lists. Others (of other
/// systems) cannot be kept.
const XATTR_PREFIXES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
/// Access lists.
const XATTR_LISTS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];
/// Attributes that mean something to overlayfs, which lies over every image: they would redirect or hide files there.
const XATTR_OVERLAY: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// Why an archive cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The archive cannot be read.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry cannot be placed.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// Applies a plain archive.
///
/// # Errors
/// The archive or one of its entries is refused.
pub fn apply_archive(tree: &mut Tree, spool: &Spool, archive: Region) -> Result<(), LayerError> {
    let mut archive = Archive::new(spool, archive);
    while let Some(entry) = archive.next()? {
        place(tree, entry)?;
    }
    Ok(())
}

/// Applies a layer whose digest was checked. Whiteouts come first wherever they stand in the archive: they are about
/// the layers below only.
///
/// # Errors
/// The archive or one of its entries is refused.
pub fn apply_layer(tree: &mut Tree, spool: &Spool, archive: Region) -> Result<(), LayerError> {
    let mut whiteouts = Archive::verified(spool, archive);
    while let Some(entry) = whiteouts.next()? {
        let (directory, name) = split_last(&entry.path);
        if name == OPAQUE {
            tree.clear(directory)?;
        } else if let Some(hidden) = name.strip_prefix(WHITEOUT)
            && !name.starts_with(BOOKKEEPING)
            && !hidden.is_empty()
        {
            tree.remove(&[directory, b"/", hidden].concat())?;
        }
    }
    let mut entries = Archive::verified(spool, archive);
    while let Some(entry) = entries.next()? {
        let is_marked = entry.path.split(|byte| *byte == b'/').any(|name| name.starts_with(WHITEOUT));
        if !is_marked {
            place(tree, entry)?;
        }
    }
    Ok(())
}

/// Directory and name; the directory is `.` for a name alone.
fn split_last(path: &[u8]) -> (&[u8], &[u8]) {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => {
            let (directory, name) = path.split_at(slash);
            (if directory.is_empty() { b"/" } else { directory }, name.strip_prefix(b"/").unwrap_or(name))
        }
        None => (b".", path),
    }
}

fn place(tree: &mut Tree, entry: Entry) -> Result<(), LayerError> {
    let Entry { path, target, kind, meta } = entry;
    let meta = Meta { xattrs: kept(meta.xattrs), ..meta };
    let kind = match kind {
        EntryKind::HardLink => return Ok(tree.link(&path, &target)?),
        EntryKind::File(contents) => Kind::File(contents),
        EntryKind::Symlink => Kind::Symlink(target),
        EntryKind::Character(major, minor) => Kind::Character(major, minor),
        EntryKind::Block(major, minor) => Kind::Block(major, minor),
        EntryKind::Directory => Kind::Directory(BTreeMap::new()),
        EntryKind::Fifo => Kind::Fifo,
    };
    Ok(tree.put(&path, meta, kind)?)
}

fn kept(mut xattrs: BTreeMap<Vec<u8>, Vec<u8>>) -> BTreeMap<Vec<u8>, Vec<u8>> {
    xattrs.retain(|name, _| {
        let named = |prefix: &&[u8]| name.starts_with(prefix) && name.len() > prefix.len();
        let known = XATTR_PREFIXES.iter().any(named) || XATTR_LISTS.contains(&name.as_slice());
        known && !XATTR_OVERLAY.iter().any(|prefix| name.starts_with(prefix))
    });
    xattrs
}
