//! How entries and append requests are written as bytes, in the log and between nodes.
//!
//! Numbers are little-endian. A command is JSON inside an entry: it was written once, by the node that proposed it, and
//! goes to every log as the same bytes. Everything that is read here may come from a stranger or a damaged disk.
//!
//! | value | bytes |
//! |---|---|
//! | log id | term, node, index: 8 each |
//! | optional log id | 1 (0 or 1), then the log id when 1 |
//! | entry | log id, kind 1 (0 blank, 1 command, 2 members), length 4, then JSON |
//! | vote | term 8, node 8, committed 1 |
//! | append | vote, optional previous log id, optional committed log id, number of entries 4, entries |

use std::io;

use openraft::raft::{AppendEntriesRequest, StreamAppendError, StreamAppendResult};
use openraft::vote::RaftLeaderId;
use openraft::vote::RaftVote;
use openraft::{EntryPayload, LogId as RaftLogId};

use super::types::{Command, Entry, LeaderId, LogId, Types, Vote};

/// Most entries of one append request; openraft sends fewer.
const ENTRIES_MAX: u32 = 65_536;

/// Reads values one after the other from bytes.
pub struct Reader<'a>(pub &'a [u8]);

fn short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the message ends early")
}

fn wrong(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

impl<'a> Reader<'a> {
    /// The next `count` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn take(&mut self, count: usize) -> io::Result<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count).ok_or_else(short)?;
        self.0 = rest;
        Ok(head)
    }

    /// One byte.
    ///
    /// # Errors
    /// There is none.
    pub fn u8(&mut self) -> io::Result<u8> {
        self.take(1)?.first().copied().ok_or_else(short)
    }

    /// A number of 4 bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().map_err(|_| short())?))
    }

    /// A number of 8 bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn u64(&mut self) -> io::Result<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().map_err(|_| short())?))
    }

    fn flag(&mut self) -> io::Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(wrong("a flag is neither 0 nor 1")),
        }
    }

    /// A log id.
    ///
    /// # Errors
    /// There is none.
    pub fn log_id(&mut self) -> io::Result<LogId> {
        let (term, node, index) = (self.u64()?, self.u64()?, self.u64()?);
        Ok(RaftLogId::new(LeaderId { term, node_id: node }.to_committed(), index))
    }

    fn optional_log_id(&mut self) -> io::Result<Option<LogId>> {
        if self.flag()? { self.log_id().map(Some) } else { Ok(None) }
    }

    fn vote(&mut self) -> io::Result<Vote> {
        let (term, node) = (self.u64()?, self.u64()?);
        Ok(Vote::from_leader_id(LeaderId { term, node_id: node }, self.flag()?))
    }

    /// An entry.
    ///
    /// # Errors
    /// It ends early or is none.
    pub fn entry(&mut self) -> io::Result<Entry> {
        let log_id = self.log_id()?;
        let kind = self.u8()?;
        let length = self.u32()?;
        let content = self.take(usize::try_from(length).map_err(|_| short())?)?;
        let payload = match kind {
            0 => EntryPayload::Blank,
            1 => EntryPayload::Normal(Command::from_bytes(content)),
            2 => EntryPayload::Membership(serde_json::from_slice(content).map_err(io::Error::from)?),
            _ => return Err(wrong("an entry of an unknown kind")),
        };
        Ok(Entry { log_id, payload })
    }

    /// An append request, which is all that is left.
    ///
    /// # Errors
    /// It ends early or is none.
    pub fn append(&mut self) -> io::Result<AppendEntriesRequest<Types>> {
        let vote = self.vote()?;
        let (prev_log_id, leader_commit) = (self.optional_log_id()?, self.optional_log_id()?);
        let count = self.u32()?;
        if count > ENTRIES_MAX {
            return Err(wrong("too many entries at once"));
        }
        let entries = (0..count).map(|_| self.entry()).collect::<io::Result<Vec<_>>>()?;
        self.end()?;
        Ok(AppendEntriesRequest { vote, prev_log_id, entries, leader_commit })
    }

    /// The answer to an append request, which is all that is left.
    ///
    /// # Errors
    /// It ends early or is none.
    pub fn appended(&mut self) -> io::Result<StreamAppendResult<Types>> {
        let answer = match self.u8()? {
            0 => Ok(self.optional_log_id()?),
            1 => Err(StreamAppendError::Conflict(self.log_id()?)),
            2 => Err(StreamAppendError::HigherVote(self.vote()?)),
            _ => return Err(wrong("an answer of an unknown kind")),
        };
        self.end()?;
        Ok(answer)
    }

    fn end(&self) -> io::Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(wrong("the message goes on after its end")) }
    }
}

fn put_log_id(out: &mut Vec<u8>, id: &LogId) {
    out.extend_from_slice(&id.leader_id.term.to_le_bytes());
    out.extend_from_slice(&id.leader_id.node_id.to_le_bytes());
    out.extend_from_slice(&id.index.to_le_bytes());
}

fn put_optional(out: &mut Vec<u8>, id: Option<&LogId>) {
    out.push(u8::from(id.is_some()));
    if let Some(id) = id {
        put_log_id(out, id);
    }
}

fn put_vote(out: &mut Vec<u8>, vote: &Vote) {
    out.extend_from_slice(&vote.leader_id.term.to_le_bytes());
    out.extend_from_slice(&vote.leader_id.node_id.to_le_bytes());
    out.push(u8::from(vote.committed));
}

/// Writes an entry.
///
/// # Errors
/// It is longer than 4 GiB, or its members cannot be written.
pub fn put_entry(out: &mut Vec<u8>, entry: &Entry) -> io::Result<()> {
    let members;
    let (kind, content): (u8, &[u8]) = match &entry.payload {
        EntryPayload::Blank => (0, &[]),
        EntryPayload::Normal(command) => (1, command.bytes()),
        EntryPayload::Membership(list) => {
            members = serde_json::to_vec(list)?;
            (2, &members)
        }
    };
    put_log_id(out, &entry.log_id);
    out.push(kind);
    out.extend_from_slice(&u32::try_from(content.len()).map_err(io::Error::other)?.to_le_bytes());
    out.extend_from_slice(content);
    Ok(())
}

/// Writes an append request.
///
/// # Errors
/// As [`put_entry`].
pub fn put_append(out: &mut Vec<u8>, request: &AppendEntriesRequest<Types>) -> io::Result<()> {
    put_vote(out, &request.vote);
    put_optional(out, request.prev_log_id.as_ref());
    put_optional(out, request.leader_commit.as_ref());
    out.extend_from_slice(&u32::try_from(request.entries.len()).map_err(io::Error::other)?.to_le_bytes());
    request.entries.iter().try_for_each(|entry| put_entry(out, entry))
}

/// Writes the answer to an append request.
pub fn put_appended(out: &mut Vec<u8>, answer: &StreamAppendResult<Types>) {
    match answer {
        Ok(id) => {
            out.push(0);
            put_optional(out, id.as_ref());
        }
        Err(StreamAppendError::Conflict(id)) => {
            out.push(1);
            put_log_id(out, id);
        }
        Err(StreamAppendError::HigherVote(vote)) => {
            out.push(2);
            put_vote(out, vote);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::state::Proposal;

    fn entries() -> Vec<Entry> {
        let command = crate::state::Command::DeleteImage { name: "x".into() };
        let proposal = Proposal { now_ms: 1, key: None, command };
        let id = |index| RaftLogId::new(LeaderId { term: 3, node_id: 2 }.to_committed(), index);
        vec![
            Entry { log_id: id(4), payload: EntryPayload::Blank },
            Entry { log_id: id(5), payload: EntryPayload::Normal(Command::new(proposal).unwrap()) },
        ]
    }

    #[test]
    fn an_append_request_comes_back_as_it_was_and_every_shorter_one_is_refused() {
        let request = AppendEntriesRequest {
            vote: Vote::from_leader_id(LeaderId { term: 3, node_id: 2 }, true),
            prev_log_id: None,
            leader_commit: Some(entries()[0].log_id),
            entries: entries(),
        };
        let mut bytes = Vec::new();
        put_append(&mut bytes, &request).unwrap();
        let back = Reader(&bytes).append().unwrap();
        assert_eq!(format!("{back:?}"), format!("{request:?}"));
        assert_eq!(back.entries, request.entries);
        for length in 0..bytes.len() {
            assert!(Reader(&bytes[..length]).append().is_err(), "{length}");
        }
        bytes.push(0);
        assert!(Reader(&bytes).append().is_err(), "something follows");
    }

    #[test]
    fn answers_come_back_as_they_were() {
        let (id, vote) = (entries()[0].log_id, Vote::from_leader_id(LeaderId { term: 9, node_id: 1 }, false));
        let answers = [
            Ok(None),
            Ok(Some(id)),
            Err(StreamAppendError::Conflict(id)),
            Err(StreamAppendError::HigherVote(vote)),
        ];
        for answer in answers {
            let mut bytes = Vec::new();
            put_appended(&mut bytes, &answer);
            assert_eq!(Reader(&bytes).appended().unwrap(), answer);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Reader(&bytes).append();
            let _ = Reader(&bytes).entry();
            let _ = Reader(&bytes).appended();
        }
    }
}
