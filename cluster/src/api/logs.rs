//! Console logs: the last lines, and what is added as long as the VM runs.
//!
//! A file cannot be waited for like a socket, and watching it by inotify needs rights on its path that this process does
//! not have. So following looks at its size every `LOOK` while the VM runs. When the log is begun anew (a new start),
//! following goes on from its beginning.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{Uri, header};
use axum::response::{IntoResponse, Response};
use blixard_api::VmId;
use futures::stream;

use super::Shared;
use super::error::Failure;
use super::query::Parameters;

/// How often a followed log is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;
/// How far back the beginning of the last lines is searched, in bytes.
const TAIL_BYTES_MAX: u64 = 64 << 20;

/// `GET …/{name}:logs?follow&tail`
///
/// # Errors
/// 404, 422, 503 without agent, or when its node cannot be reached.
pub async fn logs(api: Shared, project: &str, name: &str, request: Request) -> Result<Response, Failure> {
    let vm = api.find_newest(project, name).await?;
    match api.elsewhere(&vm) {
        Some(node) => api.pass_on(node, request).await,
        None => here(api, vm.id, request.uri()).await,
    }
}

/// The same for a VM of this node.
pub(super) async fn here(api: Shared, vm: VmId, uri: &Uri) -> Result<Response, Failure> {
    let parameters = Parameters::of(uri, &["follow", "tail"])?;
    let follow = parameters.flag("follow")?;
    let tail = parameters.number("tail", 0, u64::MAX)?;
    let file = Arc::new(File::from(api.ask_agent(move |agent| agent.open_log(vm)).await?));
    let start = Arc::clone(&file);
    let begin = tokio::task::spawn_blocking(move || match tail {
        None => Ok(0),
        Some(lines) => last_lines(&start, lines),
    });
    let begin = begin.await.map_err(io::Error::other).and_then(|r| r);
    let at = begin.map_err(|error| Failure::internal(format!("the log cannot be read: {error}")))?;
    let reader = Reader { api, vm, file, at, follow };
    let parts = stream::unfold(reader, |mut reader| async move {
        let part = reader.next().await.transpose()?;
        Some((part, reader))
    });
    let mut response = Body::from_stream(parts).into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    Ok(response)
}

struct Reader {
    api: Shared,
    vm: VmId,
    file: Arc<File>,
    at: u64,
    follow: bool,
}

impl Reader {
    /// The next part; `None` at the end.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            // Asked before the file is read: what a VM wrote before it ended is then read too.
            let goes_on = self.follow && self.may_write() && !self.api.stop.is_cancelled();
            let (file, at) = (Arc::clone(&self.file), self.at);
            let read =
                tokio::task::spawn_blocking(move || read(&file, at)).await.map_err(io::Error::other)?;
            let (at, bytes) = read?;
            self.at = at;
            if !bytes.is_empty() {
                return Ok(Some(bytes.into()));
            }
            if !goes_on {
                return Ok(None);
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = self.api.stop.cancelled() => {}
            }
        }
    }

    /// False once nothing can be added to the log of the newest start.
    fn may_write(&self) -> bool {
        let state = self.api.consensus.replica().state();
        state.vm(self.vm).is_some_and(|vm| !vm.has_ended())
    }
}

/// Some bytes from `at` on, and where to read next. A file that is shorter than `at` was begun anew.
fn read(file: &File, at: u64) -> io::Result<(u64, Vec<u8>)> {
    let at = if file.metadata()?.len() < at { 0 } else { at };
    let mut bytes = vec![0; CHUNK];
    let count = file.read_at(&mut bytes, at)?;
    bytes.truncate(count);
    Ok((at.saturating_add(u64::try_from(count).unwrap_or(0)), bytes))
}

/// Where the last `lines` lines begin. A last line without its end counts as one.
fn last_lines(file: &File, lines: u64) -> io::Result<u64> {
    let length = file.metadata()?.len();
    if lines == 0 {
        return Ok(length);
    }
    let (mut end, mut wanted) = (length, lines);
    let floor = length.saturating_sub(TAIL_BYTES_MAX);
    let chunk = u64::try_from(CHUNK).unwrap_or(u64::MAX);
    while end > floor {
        let begin = end.saturating_sub(chunk).max(floor);
        let mut bytes = vec![0; usize::try_from(end - begin).unwrap_or(CHUNK)];
        file.read_exact_at(&mut bytes, begin)?;
        for (position, byte) in (begin..end).rev().zip(bytes.into_iter().rev()) {
            // The end of the last line is not the beginning of another.
            if byte == b'\n' && position + 1 != length {
                wanted -= 1;
                if wanted == 0 {
                    return Ok(position + 1);
                }
            }
        }
        end = begin;
    }
    Ok(floor)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn tail(text: &str, lines: u64) -> String {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let begin = usize::try_from(last_lines(&file, lines).unwrap()).unwrap();
        text.get(begin..).unwrap().to_owned()
    }

    #[test]
    fn the_last_lines_begin_where_a_reader_expects() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
        assert_eq!(tail("a\nb\n", 9), "a\nb\n");
        assert_eq!(tail("a\nb\n", 0), "");
        assert_eq!(tail("", 3), "");
        assert_eq!(tail("\n\n\n", 2), "\n\n");
    }

    #[test]
    fn long_lines_are_found_across_chunks() {
        let long = "x".repeat(3 * CHUNK);
        assert_eq!(tail(&format!("a\n{long}\nz\n"), 2), format!("{long}\nz\n"));
    }

    #[test]
    fn a_log_that_was_begun_anew_is_read_from_its_beginning() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"new").unwrap();
        assert_eq!(read(&file, 100).unwrap(), (3, b"new".to_vec()));
        assert_eq!(read(&file, 1).unwrap(), (3, b"ew".to_vec()));
    }
}
