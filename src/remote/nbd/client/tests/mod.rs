#[cfg(feature = "network")]
mod encrypted;
mod exec;
mod hostile;
mod outage;
mod real;
