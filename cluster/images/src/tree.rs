//! The file tree of an image in memory, without the contents of files. Archives are applied to it entry by entry.
//!
//! It is a tree of its own rather than a directory of this machine: an ordinary process cannot give files to other
//! users or make devices, and no link in an archive can lead anywhere but to another place of this tree.

use std::collections::BTreeMap;

use crate::limits::{Budget, LimitReached, Limits};
use crate::spool::Region;
use crate::tar::{Meta, shown};

/// Longest name of one directory entry in bytes (`NAME_MAX` of limits.h).
const NAME_MAX: usize = 255;
/// Longest target of a symbolic link in bytes (`PATH_MAX` with its NUL).
const TARGET_MAX: usize = 4095;
/// Most directories within each other. Programs of the guest, and this one, walk trees recursively.
const DEPTH_MAX: usize = 512;
/// Most symbolic links on the way to one file (`MAXSYMLINKS` of the Linux kernel).
const LINKS_MAX: usize = 40;
/// Most steps of all path lookups together: ten per entry of the largest image, with room.
const STEPS_MAX: u64 = 200_000_000;
/// Most bytes of all attributes of one file. Linux allows one of 64 KiB; they lie in the image's metadata.
const XATTRS_MAX: usize = 128 << 10;
/// What a node costs beside its names and attributes: itself, and its place in a directory.
const NODE_BYTES: u64 = 256;

/// A node of a [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(usize);

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory: entries by name.
    Directory(BTreeMap<Vec<u8>, NodeId>),
    /// A regular file.
    File(Region),
    /// A symbolic link to this target.
    Symlink(Vec<u8>),
    /// A character device: major, minor.
    Character(u32, u32),
    /// A block device: major, minor.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// A file, directory or other inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Owner and so on.
    pub meta: Meta,
    /// What it is.
    pub kind: Kind,
}

/// Why an entry cannot be placed in the tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// The path has `..` in it or begins with `/`.
    #[error("entry \"{entry}\" leaves the archive: paths must be relative and have no \"..\"")]
    Escapes {
        /// Which entry.
        entry: String,
    },
    /// The path is empty, or a name in it is too long.
    #[error("entry \"{entry}\" has a name that is empty or longer than 255 bytes")]
    Name {
        /// Which entry.
        entry: String,
    },
    /// A symbolic link has an empty target or one that is too long.
    #[error("entry \"{entry}\" is a link with an empty target or one longer than 4095 bytes")]
    Target {
        /// Which entry.
        entry: String,
    },
    /// The path leads through what is no directory.
    #[error("entry \"{entry}\" lies below what is no directory")]
    NotADirectory {
        /// Which entry.
        entry: String,
    },
    /// The path leads through too many symbolic links, perhaps in a circle.
    #[error("entry \"{entry}\" lies behind more than {LINKS_MAX} symbolic links")]
    Links {
        /// Which entry.
        entry: String,
    },
    /// The path is too deep.
    #[error("entry \"{entry}\" lies below more than {DEPTH_MAX} directories")]
    Depth {
        /// Which entry.
        entry: String,
    },
    /// A hard link to what is not there, or to a directory.
    #[error("entry \"{entry}\" is a hard link to \"{target}\", which is no earlier file of the image")]
    HardLink {
        /// Which entry.
        entry: String,
        /// Its target.
        target: String,
    },
    /// The root would become something else than a directory.
    #[error("entry \"{entry}\" would replace the root directory")]
    Root {
        /// Which entry.
        entry: String,
    },
    /// More attributes than an image can hold.
    #[error("entry \"{entry}\" has attributes that are too large")]
    Attributes {
        /// Which entry.
        entry: String,
    },
    /// A bound was reached.
    #[error(transparent)]
    Limit(#[from] LimitReached),
}

/// A file tree.
pub struct Tree {
    nodes: Vec<Node>,
    entries: Budget,
    memory: Budget,
    steps: Budget,
}

/// What to do about a directory on the way that does not exist.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Stop,
}

impl Tree {
    /// An empty root directory.
    pub fn new(limits: &Limits) -> Self {
        Self {
            nodes: vec![Node { meta: directory_meta(), kind: Kind::Directory(BTreeMap::new()) }],
            entries: Budget::new("files", limits.entries),
            memory: Budget::new("bytes of names and attributes", limits.memory_bytes),
            steps: Budget::new("steps through directories and links", STEPS_MAX),
        }
    }

    /// The root directory.
    pub fn root(&self) -> NodeId {
        NodeId(0)
    }

    /// A node of this tree.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.0)
    }

    fn children(&self, id: NodeId) -> Option<&BTreeMap<Vec<u8>, NodeId>> {
        match &self.nodes.get(id.0)?.kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn children_mut(&mut self, id: NodeId) -> Option<&mut BTreeMap<Vec<u8>, NodeId>> {
        match &mut self.nodes.get_mut(id.0)?.kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn add(&mut self, node: Node) -> Result<NodeId, LimitReached> {
        self.entries.take(1)?;
        let attributes: usize = node.meta.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        let target = if let Kind::Symlink(target) = &node.kind { target.len() } else { 0 };
        self.memory.take(NODE_BYTES + u64::try_from(attributes + target).unwrap_or(u64::MAX))?;
        self.nodes.push(node);
        Ok(NodeId(self.nodes.len() - 1))
    }

    fn enter(&mut self, directory: NodeId, name: &[u8], child: NodeId) -> Result<(), LimitReached> {
        self.memory.take(u64::try_from(name.len()).unwrap_or(u64::MAX))?;
        if let Some(children) = self.children_mut(directory) {
            children.insert(name.to_vec(), child);
        }
        Ok(())
    }

    /// Walks `names` from the root; symbolic links lead to other places of this tree, `..` at most to its root.
    /// `None` if a directory is missing.
    fn walk(&mut self, entry: &[u8], names: &[&[u8]], missing: Missing) -> Result<Option<NodeId>, TreeError> {
        let mut stack = vec![self.root()];
        let mut ahead: Vec<Vec<u8>> = names.iter().rev().map(|name| name.to_vec()).collect();
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            self.steps.take(1)?;
            let here = stack.last().copied().unwrap_or(self.root());
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if stack.len() > 1 {
                        stack.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let found = self.children(here).and_then(|children| children.get(&name)).copied();
            let child = match found {
                Some(child) => child,
                None if missing == Missing::Stop => return Ok(None),
                None => {
                    check_name(entry, &name)?;
                    let made =
                        self.add(Node { meta: directory_meta(), kind: Kind::Directory(BTreeMap::new()) })?;
                    self.enter(here, &name, made)?;
                    made
                }
            };
            match self.nodes.get(child.0).map(|node| &node.kind) {
                Some(Kind::Directory(_)) if stack.len() >= DEPTH_MAX => {
                    return Err(TreeError::Depth { entry: shown(entry) });
                }
                Some(Kind::Directory(_)) => stack.push(child),
                Some(Kind::Symlink(target)) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(TreeError::Links { entry: shown(entry) });
                    }
                    if target.starts_with(b"/") {
                        stack.truncate(1);
                    }
                    ahead.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
                }
                _ => return Err(TreeError::NotADirectory { entry: shown(entry) }),
            }
        }
        Ok(stack.last().copied())
    }

    /// Places a node, replacing what was there. A directory that meets a directory only changes its owner and so on.
    ///
    /// # Errors
    /// The path leads out of the tree or cannot be walked, or a bound is reached.
    pub fn put(&mut self, path: &[u8], meta: Meta, kind: Kind) -> Result<(), TreeError> {
        let names = split(path)?;
        let attributes: usize = meta.xattrs.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
        if attributes > XATTRS_MAX || meta.xattrs.iter().any(|(n, v)| n.len() > NAME_MAX || v.len() > 0xffff)
        {
            return Err(TreeError::Attributes { entry: shown(path) });
        }
        if let Kind::Symlink(target) = &kind
            && (target.is_empty() || target.len() > TARGET_MAX)
        {
            return Err(TreeError::Target { entry: shown(path) });
        }
        let is_directory = matches!(kind, Kind::Directory(_));
        let Some((name, parents)) = names.split_last() else {
            // The root itself.
            return match self.nodes.first_mut() {
                Some(root) if is_directory => {
                    root.meta = meta;
                    Ok(())
                }
                _ => Err(TreeError::Root { entry: shown(path) }),
            };
        };
        check_name(path, name)?;
        let Some(parent) = self.walk(path, parents, Missing::Make)? else { return Ok(()) };
        let old = self.children(parent).and_then(|children| children.get(*name)).copied();
        if let Some(old) = old
            && is_directory
            && let Some(Node { meta: old, kind: Kind::Directory(_) }) = self.nodes.get_mut(old.0)
        {
            self.entries.take(1)?;
            *old = meta;
            return Ok(());
        }
        let node = self.add(Node { meta, kind })?;
        Ok(self.enter(parent, name, node)?)
    }

    /// Gives the file at `target` another name.
    ///
    /// # Errors
    /// There is no such file, or as [`Self::put`].
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), TreeError> {
        let missing = || TreeError::HardLink { entry: shown(path), target: shown(target) };
        // Some archivers write the target with the root's slash.
        let relative = target.strip_prefix(b"/").unwrap_or(target);
        let to = split(relative).map_err(|_| missing())?;
        let (last, parents) = to.split_last().ok_or_else(missing)?;
        let parent = self.walk(path, parents, Missing::Stop)?.ok_or_else(missing)?;
        let node =
            self.children(parent).and_then(|children| children.get(*last)).copied().ok_or_else(missing)?;
        if self.children(node).is_some() {
            return Err(missing());
        }
        let names = split(path)?;
        let (name, parents) = names.split_last().ok_or_else(|| TreeError::Root { entry: shown(path) })?;
        check_name(path, name)?;
        self.entries.take(1)?;
        let Some(parent) = self.walk(path, parents, Missing::Make)? else { return Ok(()) };
        Ok(self.enter(parent, name, node)?)
    }

    /// Removes what is at `path`, if anything is.
    ///
    /// # Errors
    /// The path leads out of the tree or cannot be walked.
    pub fn remove(&mut self, path: &[u8]) -> Result<(), TreeError> {
        let names = split(path)?;
        let Some((name, parents)) = names.split_last() else {
            return Err(TreeError::Root { entry: shown(path) });
        };
        if let Some(parent) = self.walk(path, parents, Missing::Stop)?
            && let Some(children) = self.children_mut(parent)
        {
            children.remove(*name);
        }
        Ok(())
    }

    /// Removes everything in the directory at `path`, if there is one.
    ///
    /// # Errors
    /// The path leads out of the tree or cannot be walked.
    pub fn clear(&mut self, path: &[u8]) -> Result<(), TreeError> {
        let names = split(path)?;
        if let Some(directory) = self.walk(path, &names, Missing::Stop)?
            && let Some(children) = self.children_mut(directory)
        {
            children.clear();
        }
        Ok(())
    }

    /// The contents of the regular file at `path`, over symbolic links; `None` if there is none.
    pub fn file(&mut self, path: &[u8]) -> Option<Region> {
        let mut path = path.to_vec();
        for _ in 0..LINKS_MAX {
            let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
            let (name, parents) = names.split_last()?;
            let parent = self.walk(&path, parents, Missing::Stop).ok()??;
            let node = self.children(parent)?.get(*name).copied()?;
            match &self.nodes.get(node.0)?.kind {
                Kind::File(region) => return Some(*region),
                Kind::Symlink(target) if target.starts_with(b"/") => path = target.clone(),
                Kind::Symlink(target) => {
                    let mut next = parents.join(&b"/"[..]);
                    next.push(b'/');
                    next.extend(target);
                    path = next;
                }
                _ => return None,
            }
        }
        None
    }
}

fn check_name(entry: &[u8], name: &[u8]) -> Result<(), TreeError> {
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(TreeError::Name { entry: shown(entry) });
    }
    Ok(())
}

/// The names of a path of an archive; none for the root.
fn split(path: &[u8]) -> Result<Vec<&[u8]>, TreeError> {
    if path.is_empty() {
        return Err(TreeError::Name { entry: String::new() });
    }
    let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|n| !matches!(*n, b"" | b".")).collect();
    if path.starts_with(b"/") || names.contains(&b"..".as_slice()) {
        return Err(TreeError::Escapes { entry: shown(path) });
    }
    Ok(names)
}

fn directory_meta() -> Meta {
    Meta { mode: 0o755, ..Meta::default() }
}
