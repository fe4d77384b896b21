//! A database whose end can be waited for: redb locks its file, and a clean end saves the next start a repair.

use std::convert::Infallible;
use std::ops::Deref;
use std::sync::Arc;

use redb::Database;
use tokio::sync::oneshot;

/// An open database. The last holder closes it.
pub(super) struct Db {
    // Dropped before `_open`, so whoever waits is told after the file is free.
    database: Database,
    _open: oneshot::Sender<Infallible>,
}

/// Ends when the database is closed.
pub struct Closed(oneshot::Receiver<Infallible>);

impl Db {
    pub(super) fn new(database: Database) -> (Arc<Self>, Closed) {
        let (open, closed) = oneshot::channel();
        (Arc::new(Self { database, _open: open }), Closed(closed))
    }
}

impl Deref for Db {
    type Target = Database;

    fn deref(&self) -> &Database {
        &self.database
    }
}

impl Closed {
    /// Waits until the database is closed.
    pub async fn wait(self) {
        // Nothing is ever sent: the error is the sender's end.
        self.0.await.ok();
    }
}
