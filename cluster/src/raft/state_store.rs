//! The replicated state on disk: one redb record per state record, together with how far the log was applied.
//!
//! Applying changes the state in memory and answers; which records changed is noted. A second later, and before a snapshot is
//! announced (which lets the log be cut), these records are written in one transaction and flushed: a record that changed ten
//! times is written once. Until then the entries are durable in the log and are applied again after a start. So an end costs at
//! most the repetition of some commands, and applying is deterministic.
//!
//! A snapshot is no copy: it is a read transaction, a view of the records at one instant.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use redb::{Database, Durability, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;

use super::db::{Closed, Db};
use super::log_store::io_error;
use super::replica::{Change, Changed, Replica};
use super::storage::{self, Storage, blocking, blocking_here};
use super::types::{Applied, Entry, LogId, SnapshotMeta, StoredMembership, Types};
use crate::clock::Clock;
use crate::node::feature_level;
use crate::state::{Command, RecordError, RecordKey, State};

const RECORDS: TableDefinition<&str, &[u8]> = TableDefinition::new("records");
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const APPLIED: &str = "applied";
const MEMBERSHIP: &str = "membership";
const SNAPSHOT: &str = "snapshot";
const SCHEMA: &str = "schema";
/// Version of the tables.
const SCHEMA_VERSION: u32 = 1;
/// Page cache of the state file in bytes. All records are in memory anyway, so it holds the pages that are written next.
const CACHE_BYTES: usize = 24 << 20;
/// Time from a change until it is written, along with those after it.
const WRITE_AFTER: Duration = Duration::from_secs(1);
/// Most entries that are applied in one go: bounds how long readers wait.
const BATCH_MAX: usize = 512;

/// Why the state cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// redb refuses the file.
    #[error("cannot open the state")]
    Open(#[source] Box<redb::Error>),
    /// What is in the file cannot be read.
    #[error("cannot read the state")]
    Read(#[source] io::Error),
    /// A newer version wrote the file.
    #[error("the state has schema version {found}, this program knows {SCHEMA_VERSION}")]
    Newer {
        /// Version in the file.
        found: u32,
    },
    /// The cluster agreed on commands that this program may not know: going on, it could come to another state than the others.
    #[error(
        "the cluster has feature level {needs}, this program knows up to {}: install a newer version",
        feature_level()
    )]
    Level {
        /// The feature level of the cluster.
        needs: u32,
    },
}

/// The state machine that openraft drives.
pub struct StateStore {
    shared: Arc<Shared>,
}

/// What applying and making snapshots share. Locks are taken in this order: `writing`, `pending`, the replica's state.
struct Shared {
    db: Arc<Db>,
    replica: Arc<Replica>,
    pending: Mutex<Pending>,
    /// Held from taking what is pending until it is in the database, so that it gets there in order.
    writing: Mutex<()>,
}

/// What is in the replica and not yet in the database.
struct Pending {
    applied: Option<LogId>,
    membership: StoredMembership,
    records: BTreeSet<RecordKey>,
    /// Whether it will be written without anybody asking.
    scheduled: bool,
    /// Why it could not be written.
    failed: Option<io::Error>,
}

impl Pending {
    fn nothing(applied: Option<LogId>, membership: StoredMembership) -> Self {
        Self { applied, membership, records: BTreeSet::new(), scheduled: false, failed: None }
    }
}

/// The content of a snapshot.
pub enum SnapshotData {
    /// A view of our own records.
    View(Box<ReadTransaction>),
    /// Records as they came from another node, one after the other as [`put_record`] writes them.
    Spool(File),
}

/// Largest record in bytes.
const RECORD_BYTES_MAX: u32 = 16 << 20;

/// Writes a record: length of the key (4 bytes, little-endian), key, length of the value, value.
///
/// # Errors
/// One of them is too long.
pub fn put_record(out: &mut Vec<u8>, key: &str, value: &[u8]) -> io::Result<()> {
    for bytes in [key.as_bytes(), value] {
        let length = u32::try_from(bytes.len()).ok().filter(|length| *length <= RECORD_BYTES_MAX);
        let length =
            length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a record is too long"))?;
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(bytes);
    }
    Ok(())
}

/// The next part of a record; `None` at the end.
fn next_part(reader: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match reader.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let length = u32::from_le_bytes(length);
    if length > RECORD_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a record is too long"));
    }
    let mut bytes = Vec::new();
    reader.take(u64::from(length)).read_to_end(&mut bytes)?;
    if bytes.len() != usize::try_from(length).map_err(io::Error::other)? {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(bytes))
}

impl SnapshotData {
    /// The records behind `after`, as [`put_record`] writes them, until they are this many bytes, and the key of the last; `None`
    /// at the end.
    ///
    /// # Errors
    /// They cannot be read. What came from another node is not sent on.
    pub fn part(&self, after: Option<&str>, bytes: usize) -> io::Result<Option<(Vec<u8>, String)>> {
        let Self::View(transaction) = self else { return Err(io::ErrorKind::Unsupported.into()) };
        let table = transaction.open_table(RECORDS).map_err(io_error)?;
        let begin = after.map_or(Bound::Unbounded, Bound::Excluded);
        let (mut part, mut last) = (Vec::with_capacity(bytes), None);
        for item in table.range::<&str>((begin, Bound::Unbounded)).map_err(io_error)? {
            let (key, value) = item.map_err(io_error)?;
            put_record(&mut part, key.value(), value.value())?;
            last = Some(key.value().to_owned());
            if part.len() >= bytes {
                break;
            }
        }
        Ok(last.map(|last| (part, last)))
    }

    /// Calls `each` with every record: key and JSON value.
    ///
    /// # Errors
    /// The file cannot be read or is damaged, or what `each` answers.
    pub fn for_each(&self, mut each: impl FnMut(&str, &[u8]) -> io::Result<()>) -> io::Result<()> {
        match self {
            Self::View(transaction) => {
                let table = transaction.open_table(RECORDS).map_err(io_error)?;
                for item in table.iter().map_err(io_error)? {
                    let (key, value) = item.map_err(io_error)?;
                    each(key.value(), value.value())?;
                }
                Ok(())
            }
            Self::Spool(file) => {
                let mut file = file;
                file.rewind()?;
                let mut reader = BufReader::new(file);
                while let Some(key) = next_part(&mut reader)? {
                    let key =
                        String::from_utf8(key).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
                    let value = next_part(&mut reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
                    each(&key, &value)?;
                }
                Ok(())
            }
        }
    }
}

fn record_error(error: RecordError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Whether this program knows all that the cluster may have agreed on.
fn check_level(state: &State) -> Result<(), StateError> {
    match state.cluster().map(|cluster| cluster.feature_level) {
        Some(needs) if needs > feature_level() => Err(StateError::Level { needs }),
        _ => Ok(()),
    }
}

fn json<T: serde::Serialize>(value: &T) -> io::Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(io::Error::other)
}

/// The state that these records make up.
fn state_of(revision: u64, data: &SnapshotData) -> io::Result<State> {
    let mut state = State::begin(revision);
    data.for_each(|key, value| state.load(key, value).map_err(record_error))?;
    state.loaded();
    Ok(state)
}

fn meta<T: DeserializeOwned>(transaction: &ReadTransaction, key: &str) -> io::Result<Option<T>> {
    let table = transaction.open_table(META).map_err(io_error)?;
    let value = table.get(key).map_err(io_error)?;
    value.map(|v| serde_json::from_slice(v.value())).transpose().map_err(io::Error::other)
}

impl StateStore {
    /// Opens the state, and makes it when there is none.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn open(storage: &dyn Storage, clock: Clock) -> Result<(Self, Closed), StateError> {
        let db = storage.open(storage::STATE, CACHE_BYTES);
        let db = db.map_err(|e| StateError::Open(Box::new(e.into())))?;
        let found = prepare(&db).map_err(|e| StateError::Open(Box::new(e)))?;
        if found > SCHEMA_VERSION {
            return Err(StateError::Newer { found });
        }
        let read = || -> io::Result<(State, Option<LogId>, StoredMembership)> {
            let transaction = db.begin_read().map_err(io_error)?;
            let applied: Option<LogId> = meta(&transaction, APPLIED)?.flatten();
            let revision = applied.map_or(0, |id| id.index);
            let membership = meta(&transaction, MEMBERSHIP)?.unwrap_or_default();
            let state = state_of(revision, &SnapshotData::View(Box::new(transaction)))?;
            Ok((state, applied, membership))
        };
        let (state, applied, membership) = read().map_err(StateError::Read)?;
        check_level(&state)?;
        let broken = crate::state::invariants::broken(&state);
        if !broken.is_empty() {
            let text = format!("not true of the stored state: {}", broken.join("; "));
            return Err(StateError::Read(io::Error::new(io::ErrorKind::InvalidData, text)));
        }
        let replica = Arc::new(Replica::new(state, clock));
        let (db, closed) = Db::new(db);
        let pending = Mutex::new(Pending::nothing(applied, membership));
        let shared = Shared { db, replica, pending, writing: Mutex::new(()) };
        Ok((Self { shared: Arc::new(shared) }, closed))
    }

    /// Applies entries of the log that count as agreed, outside of Raft.
    ///
    /// # Errors
    /// One of them is none that this program knows.
    pub(super) fn catch_up(&self, entries: Vec<Entry>) -> io::Result<()> {
        self.shared.apply(entries.into_iter().map(|entry| (entry, None)).collect())
    }

    /// The state as the rest of the process sees it.
    pub fn replica(&self) -> Arc<Replica> {
        Arc::clone(&self.shared.replica)
    }
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies a batch to the state in memory, and answers.
    fn apply(&self, batch: Vec<EntryResponder<Types>>) -> io::Result<()> {
        let mut answers = Vec::with_capacity(batch.len());
        let mut changes = Vec::new();
        let mut pending = self.pending();
        if let Some(error) = pending.failed.take() {
            return Err(error);
        }
        {
            let mut state = self.replica.state_mut();
            pending.records.extend(state.take_changed());
            for (entry, responder) in batch {
                let (log_id, index) = (entry.log_id, entry.log_id.index);
                let applied = match entry.payload {
                    EntryPayload::Blank => {
                        state.advance(index);
                        Applied::Nothing
                    }
                    EntryPayload::Membership(members) => {
                        pending.membership = StoredMembership::new(Some(entry.log_id), members);
                        state.advance(index);
                        Applied::Nothing
                    }
                    EntryPayload::Normal(command) => {
                        // Nobody may go on without what the others applied.
                        let proposal = command.proposal().map_err(io::Error::from)?;
                        let leaving = match &proposal.command {
                            Command::ForgetVm { id, .. } => state.vm(*id).cloned(),
                            _ => None,
                        };
                        let outcome = state.apply(index, &proposal);
                        let changed = state.take_changed();
                        for key in &changed {
                            let RecordKey::Vm(id) = key else { continue };
                            let what = match (state.vm(*id), &leaving) {
                                (Some(vm), _) => Changed::Vm(Arc::clone(vm)),
                                (None, Some(vm)) => Changed::VmGone(Arc::clone(vm)),
                                (None, None) => continue,
                            };
                            changes.push(Change { revision: index, what });
                        }
                        pending.records.extend(changed);
                        Applied::Command(Box::new(outcome))
                    }
                };
                // Only now: a snapshot that is being made writes it, and an entry that counts as applied is never looked at again.
                pending.applied = Some(log_id);
                check_level(&state).map_err(io::Error::other)?;
                answers.push((responder, applied));
            }
        }
        let revision = pending.applied.map_or(0, |id| id.index);
        drop(pending);
        self.replica.publish(revision, changes);
        for (responder, applied) in answers {
            if let Some(responder) = responder {
                responder.send(applied);
            }
        }
        Ok(())
    }

    /// Sees to it that what is pending is written before long.
    fn schedule(self: &Arc<Self>) {
        if std::mem::replace(&mut self.pending().scheduled, true) {
            return;
        }
        // Whoever waits for the end of the database waits no longer for this.
        let shared = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(WRITE_AFTER).await;
            let Some(shared) = shared.upgrade() else { return };
            shared.pending().scheduled = false;
            let writer = Arc::clone(&shared);
            let written = blocking(move || writer.write(&writer.writing(), false)).await;
            if let Err(error) = written {
                tracing::error!(%error, "the state cannot be written");
                shared.pending().failed = Some(error);
            }
        });
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is pending and flushes it; `mark` says that a snapshot exists.
    fn write(&self, _writing: &MutexGuard<'_, ()>, mark: bool) -> io::Result<()> {
        let mut pending = self.pending();
        let keys = std::mem::take(&mut pending.records);
        let mut records = Vec::with_capacity(keys.len());
        {
            let state = self.replica.state();
            for key in keys {
                let value = state.record(&key).map_err(record_error)?;
                records.push((key.to_string(), value));
            }
        }
        let revision = pending.applied.map_or(0, |id| id.index);
        let (applied, membership) = (json(&pending.applied)?, json(&pending.membership)?);
        drop(pending);
        let commit = || -> Result<(), redb::Error> {
            let mut transaction = self.db.begin_write()?;
            transaction.set_durability(Durability::Immediate)?;
            transaction.set_quick_repair(true);
            {
                let mut table = transaction.open_table(RECORDS)?;
                for (key, value) in &records {
                    match value {
                        Some(value) => table.insert(key.as_str(), value.as_slice())?,
                        None => table.remove(key.as_str())?,
                    };
                }
                let mut meta = transaction.open_table(META)?;
                meta.insert(APPLIED, applied.as_slice())?;
                meta.insert(MEMBERSHIP, membership.as_slice())?;
                if mark {
                    meta.insert(SNAPSHOT, b"true".as_slice())?;
                }
            }
            transaction.commit()?;
            Ok(())
        };
        commit().map_err(io_error)?;
        self.replica.set_stored(revision);
        Ok(())
    }

    /// Puts what another node has in the place of all that is here.
    fn replace(&self, snapshot: &SnapshotMeta, data: &SnapshotData) -> io::Result<()> {
        // First a look at all of it: what is damaged replaces nothing.
        let state = state_of(snapshot.last_log_id.map_or(0, |id| id.index), data)?;
        check_level(&state).map_err(io::Error::other)?;
        let (applied, membership) = (json(&snapshot.last_log_id)?, json(&snapshot.last_membership)?);
        let _writing = self.writing();
        let mut transaction = self.db.begin_write().map_err(io_error)?;
        transaction.set_durability(Durability::Immediate).map_err(io_error)?;
        transaction.set_quick_repair(true);
        transaction.delete_table(RECORDS).map_err(io_error)?;
        {
            let mut table = transaction.open_table(RECORDS).map_err(io_error)?;
            data.for_each(|key, value| table.insert(key, value).map(drop).map_err(io_error))?;
            let mut meta = transaction.open_table(META).map_err(io_error)?;
            meta.insert(APPLIED, applied.as_slice()).map_err(io_error)?;
            meta.insert(MEMBERSHIP, membership.as_slice()).map_err(io_error)?;
            meta.insert(SNAPSHOT, b"true".as_slice()).map_err(io_error)?;
        }
        transaction.commit().map_err(io_error)?;
        let mut pending = self.pending();
        self.replica.replace(state);
        self.replica.set_stored(snapshot.last_log_id.map_or(0, |id| id.index));
        let scheduled = pending.scheduled;
        let (applied, membership) = (snapshot.last_log_id, snapshot.last_membership.clone());
        *pending = Pending { scheduled, ..Pending::nothing(applied, membership) };
        Ok(())
    }
}

/// Makes the tables; answers the schema version of the file.
fn prepare(db: &Database) -> Result<u32, redb::Error> {
    let transaction = db.begin_write()?;
    let version = {
        transaction.open_table(RECORDS)?;
        let mut meta = transaction.open_table(META)?;
        let found = meta.get(SCHEMA)?.and_then(|v| v.value().try_into().ok().map(u32::from_le_bytes));
        if found.is_none() {
            meta.insert(SCHEMA, SCHEMA_VERSION.to_le_bytes().as_slice())?;
        }
        found.unwrap_or(SCHEMA_VERSION)
    };
    transaction.commit()?;
    Ok(version)
}

fn view(db: &Database) -> io::Result<openraft::alias::SnapshotOf<Types, SnapshotData>> {
    let transaction = db.begin_read().map_err(io_error)?;
    let meta = SnapshotMeta {
        last_log_id: meta(&transaction, APPLIED)?.flatten(),
        last_membership: meta(&transaction, MEMBERSHIP)?.unwrap_or_default(),
    };
    Ok(openraft::Snapshot { meta, snapshot: SnapshotData::View(Box::new(transaction)) })
}

/// Makes snapshots while the state goes on changing.
pub struct SnapshotBuilder {
    shared: Arc<Shared>,
}

impl RaftSnapshotBuilder<Types> for SnapshotBuilder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> io::Result<openraft::alias::SnapshotOf<Types, SnapshotData>> {
        let shared = Arc::clone(&self.shared);
        let build = move || {
            let writing = shared.writing();
            shared.write(&writing, true)?;
            view(&shared.db)
        };
        blocking(build).await
    }
}

impl RaftStateMachine<Types> for StateStore {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let pending = self.shared.pending();
        Ok((pending.applied, pending.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        loop {
            let mut batch = Vec::new();
            while batch.len() < BATCH_MAX {
                match entries.next().await {
                    Some(entry) => batch.push(entry?),
                    None => break,
                }
            }
            if batch.is_empty() {
                return Ok(());
            }
            self.shared.apply(batch)?;
            self.shared.schedule();
        }
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder { shared: Arc::clone(&self.shared) }
    }

    async fn install_snapshot(&mut self, snapshot: &SnapshotMeta, data: SnapshotData) -> io::Result<()> {
        blocking_here(|| self.shared.replace(snapshot, &data))
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<Option<openraft::alias::SnapshotOf<Types, SnapshotData>>> {
        let transaction = self.shared.db.begin_read().map_err(io_error)?;
        let made: Option<bool> = meta(&transaction, SNAPSHOT)?;
        if made.is_none() {
            return Ok(None);
        }
        view(&self.shared.db).map(Some)
    }
}
