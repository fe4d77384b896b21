//! Clients that ask again and again for some time, each in a thread of its own.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::RaftError;

/// A connection that asks.
pub trait Client: Send {
    /// One durable write; answers once it is acknowledged. `number` is another one each time.
    ///
    /// # Errors
    /// It was not acknowledged.
    fn write(&mut self, number: u64) -> Result<(), RaftError>;
    /// One linearizable read.
    ///
    /// # Errors
    /// It was not answered.
    fn read(&mut self) -> Result<(), RaftError>;
}

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// Answers per second.
    pub rate: f64,
    /// Median time of an answer in milliseconds.
    pub p50_ms: f64,
    /// 99th of 100 times in milliseconds.
    pub p99_ms: f64,
    /// Answers.
    pub answers: usize,
}

/// The time below which `percent` of the sorted times lie.
pub fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let at = sorted.len().saturating_mul(percent) / 100;
    sorted.get(at.min(sorted.len().saturating_sub(1))).map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
}

/// Lets all clients ask for this long.
pub fn run(clients: Vec<impl Client>, write: bool, time: Duration) -> Result<Run, RaftError> {
    let begin = Instant::now();
    let end = begin + time;
    let results: Vec<Result<Vec<Duration>, RaftError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .into_iter()
            .map(|mut client| {
                scope.spawn(move || {
                    let mut times = Vec::new();
                    let mut number = 0;
                    while Instant::now() < end {
                        let asked = Instant::now();
                        number += 1;
                        if write {
                            client.write(number)?
                        } else {
                            client.read()?
                        }
                        times.push(asked.elapsed());
                    }
                    Ok(times)
                })
            })
            .collect();
        let ended = || Err(RaftError::Wrong("a client ended early".into()));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| ended())).collect()
    });
    let took = begin.elapsed().as_secs_f64();
    let mut times: Vec<Duration> = results.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
    times.sort();
    let count = u32::try_from(times.len()).unwrap_or(u32::MAX);
    Ok(Run {
        rate: f64::from(count) / took,
        p50_ms: percentile(&times, 50),
        p99_ms: percentile(&times, 99),
        answers: times.len(),
    })
}
