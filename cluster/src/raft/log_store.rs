//! The Raft log and the vote: a redb file, and a [`Journal`] of what it does not have yet.
//!
//! Entries are readable at once (from memory) and durable a little later: a [`Writer`] on a thread of its own takes all that has
//! piled up since its last flush and puts it into the journal with one flush, so that many proposals share it. It reports each
//! batch only after the flush. Votes, truncations and purges take the same road, in order. When the journal is full, all of it
//! goes into the database in one flushed transaction; until then the entries stay in memory. An end in good order and each start
//! do the same.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openraft::OptionalSend;
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::{mpsc, oneshot};

use super::codec::{self, Reader};
use super::db::{Closed, Db};
use super::journal::{Journal, Op};
use super::storage::{self, Storage, blocking};
use super::types::{Entry, LogId, Types, Vote};

const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const VOTE: &str = "vote";
const PURGED: &str = "purged";
const SCHEMA: &str = "schema";
/// The journal's generation that the database contains.
const GENERATION: &str = "journal";
/// Version of the tables and of the entries' encoding. 1: entries are JSON. 2: as [`codec`] writes them. 3: there is a journal.
const SCHEMA_VERSION: u32 = 3;
/// Page cache of the log file in bytes: it is read at start and by slow followers only.
const CACHE_BYTES: usize = 8 << 20;
/// Entries of the database that stay in memory for whoever applies or replicates them next.
const RECENT_MAX: usize = 1024;
/// Most jobs of one transaction: bounds how long the first of them waits for its flush.
const BATCH_MAX: usize = 4096;

/// Why the log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// redb refuses the file.
    #[error("cannot open the log")]
    Open(#[source] Box<redb::Error>),
    /// What is in the file cannot be read.
    #[error("cannot read the log")]
    Read(#[source] io::Error),
    /// An older version wrote the file, and it cannot be brought to the present form.
    #[error("cannot bring the log to schema version {SCHEMA_VERSION}")]
    Upgrade(#[source] io::Error),
    /// A newer version wrote the file.
    #[error("the log has schema version {found}, this program knows {SCHEMA_VERSION}")]
    Newer {
        /// Version in the file.
        found: u32,
    },
    /// The journal cannot be used.
    #[error("cannot use the journal of the log")]
    Journal(#[source] io::Error),
    /// What the journal has cannot be put into the database.
    #[error("cannot put the journal into the log")]
    Replay(#[source] io::Error),
    /// The writer thread cannot be started.
    #[error("cannot start the log's writer")]
    Writer(#[source] io::Error),
}

struct Job {
    ops: Vec<Op>,
    then: Then,
}

/// Who is told that a job is durable.
enum Then {
    Flushed(IOFlushed<Types>),
    Done(oneshot::Sender<io::Result<()>>),
}

/// What is known without reading the file.
#[derive(Debug, Default)]
struct Memory {
    /// The newest entries, without a gap up to the last.
    recent: BTreeMap<u64, Entry>,
    last: Option<LogId>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    /// Index up to which entries are in the database.
    stored: u64,
}

struct Shared {
    db: Arc<Db>,
    memory: Mutex<Memory>,
}

impl Shared {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The log. Clones read and write the same one.
#[derive(Clone)]
pub struct LogStore {
    shared: Arc<Shared>,
    jobs: mpsc::UnboundedSender<Job>,
}

/// A log, and the end of its database.
pub type Opened = (LogStore, Closed);

pub(super) fn io_error(error: impl Into<redb::Error>) -> io::Error {
    io::Error::other(error.into())
}

fn json_error(error: serde_json::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl LogStore {
    /// Opens the log, and makes it when there is none.
    ///
    /// # Errors
    /// See [`LogError`].
    pub fn open(storage: &dyn Storage) -> Result<Opened, LogError> {
        let db = storage.open(storage::LOG, CACHE_BYTES);
        let db = db.map_err(|e| LogError::Open(Box::new(e.into())))?;
        let opened = |error: redb::Error| LogError::Open(Box::new(error));
        let found = schema(&db).map_err(opened)?;
        if let Some(found) = found.filter(|found| *found > SCHEMA_VERSION) {
            return Err(LogError::Newer { found });
        }
        // The journal comes first: a database that has the schema has one.
        let new = found != Some(SCHEMA_VERSION);
        let (file, capacity) = storage.journal().map_err(LogError::Journal)?;
        let generation = if new { 0 } else { generation(&db).map_err(LogError::Read)? };
        let (mut journal, lacking) =
            Journal::open(file, capacity, generation, new).map_err(LogError::Journal)?;
        match found {
            None => prepare(&db).map_err(opened)?,
            Some(SCHEMA_VERSION) => {}
            Some(from) => {
                upgrade(&db, from).map_err(LogError::Upgrade)?;
                tracing::info!(from, to = SCHEMA_VERSION, "the log has another schema now");
            }
        }
        if !lacking.is_empty() {
            commit(&db, &lacking, journal.generation()).map_err(io_error).map_err(LogError::Replay)?;
            journal.stored();
        }
        let memory = recall(&db).map_err(LogError::Read)?;
        let (db, closed) = Db::new(db);
        let last_written = memory.stored;
        let shared = Arc::new(Shared { db, memory: Mutex::new(memory) });
        // Bounded by openraft: it waits for earlier entries before it accepts more.
        let (jobs, queue) = mpsc::unbounded_channel();
        let writer = Writer {
            shared: Arc::clone(&shared),
            queue,
            first: None,
            journal,
            lacking: Vec::new(),
            last_written,
        };
        storage.run(writer).map_err(LogError::Writer)?;
        Ok((Self { shared, jobs }, closed))
    }

    /// Does it in order with all else; answers when it is durable.
    async fn run(&self, op: Op) -> io::Result<()> {
        let (done, answer) = oneshot::channel();
        self.jobs.send(Job { ops: vec![op], then: Then::Done(done) }).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

fn gone() -> io::Error {
    io::Error::other("the log's writer has ended")
}

/// The schema version of the file, if it has tables.
fn schema(db: &Database) -> Result<Option<u32>, redb::Error> {
    let transaction = db.begin_read()?;
    let meta = match transaction.open_table(META) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        meta => meta?,
    };
    Ok(meta.get(SCHEMA)?.and_then(|v| v.value().try_into().ok().map(u32::from_le_bytes)))
}

/// The newest generation of the journal that is in the database.
fn generation(db: &Database) -> io::Result<u64> {
    let transaction = db.begin_read().map_err(io_error)?;
    let meta = transaction.open_table(META).map_err(io_error)?;
    let found = meta.get(GENERATION).map_err(io_error)?;
    Ok(found.and_then(|v| v.value().try_into().ok().map(u64::from_le_bytes)).unwrap_or(0))
}

/// Makes the tables.
fn prepare(db: &Database) -> Result<(), redb::Error> {
    let transaction = db.begin_write()?;
    transaction.open_table(LOG)?;
    transaction.open_table(META)?.insert(SCHEMA, SCHEMA_VERSION.to_le_bytes().as_slice())?;
    transaction.commit()?;
    Ok(())
}

/// Brings the tables of an older schema version to the present form, all or nothing.
fn upgrade(db: &Database, from: u32) -> io::Result<()> {
    let transaction = db.begin_write().map_err(io_error)?;
    {
        let mut log = transaction.open_table(LOG).map_err(io_error)?;
        let mut entries = Vec::new();
        if from < 2 {
            for item in log.iter().map_err(io_error)? {
                let (index, value) = item.map_err(io_error)?;
                let entry: Entry = serde_json::from_slice(value.value()).map_err(json_error)?;
                entries.push((index.value(), encode(&entry)?));
            }
        }
        for (index, value) in entries {
            log.insert(index, value.as_slice()).map_err(io_error)?;
        }
        let mut meta = transaction.open_table(META).map_err(io_error)?;
        meta.insert(SCHEMA, SCHEMA_VERSION.to_le_bytes().as_slice()).map_err(io_error)?;
    }
    transaction.commit().map_err(io_error)
}

fn encode(entry: &Entry) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(512);
    codec::put_entry(&mut bytes, entry)?;
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> io::Result<Entry> {
    Reader(bytes).entry()
}

fn recall(db: &Database) -> io::Result<Memory> {
    let transaction = db.begin_read().map_err(io_error)?;
    let meta = transaction.open_table(META).map_err(io_error)?;
    let log = transaction.open_table(LOG).map_err(io_error)?;
    let vote = meta.get(VOTE).map_err(io_error)?;
    let purged = meta.get(PURGED).map_err(io_error)?;
    let last = log.last().map_err(io_error)?;
    let last = last.map(|(_, value)| decode(value.value())).transpose()?;
    let purged: Option<LogId> =
        purged.map(|v| serde_json::from_slice(v.value())).transpose().map_err(json_error)?;
    let last = last.map(|entry| entry.log_id()).or(purged);
    Ok(Memory {
        recent: BTreeMap::new(),
        stored: last.map_or(0, |id| id.index),
        last,
        purged,
        vote: vote.map(|v| serde_json::from_slice(v.value())).transpose().map_err(json_error)?,
    })
}

/// Writes what is to be durable, and says so. Ends when nobody can ask for it any more.
pub struct Writer {
    shared: Arc<Shared>,
    queue: mpsc::UnboundedReceiver<Job>,
    /// Waited for and not yet written.
    first: Option<Job>,
    journal: Journal,
    /// What is in the journal and not in the database, in order.
    lacking: Vec<Op>,
    /// Index of the last entry that was written anywhere.
    last_written: u64,
}

impl Writer {
    /// All of its work, on a thread that may wait.
    pub fn run(mut self) {
        while let Some(first) = self.queue.blocking_recv() {
            self.first = Some(first);
            self.write();
        }
        self.end();
    }

    /// Waits until there is something to write; false at the end.
    pub async fn ready(&mut self) -> bool {
        if self.first.is_none() {
            self.first = self.queue.recv().await;
        }
        self.first.is_some()
    }

    /// Writes all that has piled up, with one flush.
    pub fn write(&mut self) {
        let piled_up = std::iter::from_fn(|| self.queue.try_recv().ok()).take(BATCH_MAX - 1);
        let jobs: Vec<Job> = self.first.take().into_iter().chain(piled_up).collect();
        let mut answers = Vec::with_capacity(jobs.len());
        let old = self.lacking.len();
        for job in jobs {
            self.lacking.extend(job.ops);
            answers.push(job.then);
        }
        let result = self.make_durable(old);
        if let Err(error) = &result {
            tracing::error!(%error, "the log cannot be written");
        }
        for then in answers {
            let answer = match &result {
                Ok(()) => Ok(()),
                Err(error) => Err(io::Error::other(error.to_string())),
            };
            match then {
                Then::Flushed(flushed) => flushed.io_completed(answer),
                // Nobody waits any more when the node is being stopped.
                Then::Done(done) => drop(done.send(answer)),
            }
        }
    }

    /// The operations from `old` on are new.
    fn make_durable(&mut self, old: usize) -> io::Result<()> {
        let new = self.lacking.get(old..).unwrap_or_default();
        for op in new {
            match op {
                Op::Entry(index, _) => self.last_written = *index,
                Op::TruncateFrom(index) => {
                    self.last_written = index.saturating_sub(1);
                    let mut memory = self.shared.memory();
                    memory.stored = memory.stored.min(self.last_written);
                }
                Op::Purge(upto, _) => self.last_written = self.last_written.max(*upto),
                Op::Vote(_) => {}
            }
        }
        let result = match self.journal.append(new.iter()) {
            Ok(true) => Ok(()),
            Ok(false) => self.store(),
            Err(error) => Err(error),
        };
        if result.is_err() {
            // Nobody was told that these are durable.
            self.lacking.truncate(old);
        }
        result
    }

    /// Puts all that the database lacks into it.
    fn store(&mut self) -> io::Result<()> {
        commit(&self.shared.db, &self.lacking, self.journal.generation()).map_err(io_error)?;
        self.lacking.clear();
        self.journal.stored();
        let mut memory = self.shared.memory();
        memory.stored = self.last_written;
        forget_old(&mut memory);
        Ok(())
    }

    /// The end in good order: the next start has nothing to do.
    pub fn end(mut self) {
        if !self.lacking.is_empty()
            && let Err(error) = self.store()
        {
            tracing::error!(%error, "the log cannot be written; its journal has all of it");
        }
    }
}

fn forget_old(memory: &mut Memory) {
    while memory.recent.len() > RECENT_MAX {
        match memory.recent.first_key_value() {
            Some((index, _)) if *index <= memory.stored => memory.recent.pop_first(),
            _ => break,
        };
    }
}

fn commit(db: &Database, ops: &[Op], generation: u64) -> Result<(), redb::Error> {
    // Under load most entries are in a snapshot, and purged, before they come here.
    let purged = |op: &Op| if let Op::Purge(upto, _) = op { Some(*upto) } else { None };
    let purged = ops.iter().filter_map(purged).max();
    let transaction = db.begin_write()?;
    {
        let mut log = transaction.open_table(LOG)?;
        let mut meta = transaction.open_table(META)?;
        for op in ops {
            match op {
                Op::Entry(index, _) if purged.is_some_and(|upto| *index <= upto) => {}
                Op::Entry(index, value) => {
                    log.insert(index, value.as_slice())?;
                }
                Op::Vote(value) => {
                    meta.insert(VOTE, value.as_slice())?;
                }
                Op::TruncateFrom(index) => log.retain_in(*index.., |_, _| false)?,
                Op::Purge(upto, value) => {
                    meta.insert(PURGED, value.as_slice())?;
                    log.retain_in(..=*upto, |_, _| false)?;
                }
            }
        }
        meta.insert(GENERATION, generation.to_le_bytes().as_slice())?;
    }
    transaction.commit()?;
    Ok(())
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let begin = match range.start_bound() {
            Bound::Included(i) => *i,
            Bound::Excluded(i) => i.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(i) => i.saturating_add(1),
            Bound::Excluded(i) => *i,
            Bound::Unbounded => u64::MAX,
        };
        let (recent, known_from, begin, end) = {
            let memory = self.shared.memory();
            // The database may still have entries that were purged or truncated.
            let begin = begin.max(memory.purged.map_or(0, |id| id.index.saturating_add(1)));
            let end = end.min(memory.last.map_or(0, |id| id.index.saturating_add(1)));
            if begin >= end {
                return Ok(Vec::new());
            }
            let recent: Vec<Entry> = memory.recent.range(begin..end).map(|(_, e)| e.clone()).collect();
            let known_from = memory.recent.first_key_value().map_or(u64::MAX, |(index, _)| *index);
            (recent, known_from, begin, end)
        };
        if known_from <= begin {
            return Ok(recent);
        }
        let shared = Arc::clone(&self.shared);
        let mut entries = blocking(move || read(&shared.db, begin, end.min(known_from))).await?;
        entries.extend(recent);
        Ok(entries)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.shared.memory().vote)
    }
}

fn read(db: &Database, begin: u64, end: u64) -> io::Result<Vec<Entry>> {
    let transaction = db.begin_read().map_err(io_error)?;
    let log = transaction.open_table(LOG).map_err(io_error)?;
    let mut entries = Vec::new();
    for item in log.range(begin..end).map_err(io_error)? {
        let (_, value) = item.map_err(io_error)?;
        entries.push(decode(value.value())?);
    }
    Ok(entries)
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, io::Error> {
        let memory = self.shared.memory();
        Ok(LogState { last_purged_log_id: memory.purged, last_log_id: memory.last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let value = serde_json::to_vec(vote).map_err(json_error)?;
        self.run(Op::Vote(value)).await?;
        self.shared.memory().vote = Some(*vote);
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut ops = Vec::new();
        {
            let mut memory = self.shared.memory();
            for entry in entries {
                let id = entry.log_id();
                ops.push(Op::Entry(id.index, encode(&entry)?));
                memory.last = Some(id);
                memory.recent.insert(id.index, entry);
            }
        }
        self.jobs.send(Job { ops, then: Then::Flushed(callback) }).map_err(|_| gone())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let first_gone = last.map_or(0, |id| id.index.saturating_add(1));
        {
            let mut memory = self.shared.memory();
            memory.recent.split_off(&first_gone);
            memory.last = memory.last.min(last).max(memory.purged);
        }
        self.run(Op::TruncateFrom(first_gone)).await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        {
            let mut memory = self.shared.memory();
            memory.purged = Some(log_id);
            memory.last = memory.last.max(Some(log_id));
            memory.recent = memory.recent.split_off(&log_id.index.saturating_add(1));
        }
        let value = serde_json::to_vec(&log_id).map_err(json_error)?;
        self.run(Op::Purge(log_id.index, value)).await
    }
}

#[cfg(test)]
#[path = "log_store_test.rs"]
mod tests;
