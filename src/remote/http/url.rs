//! Addresses, and where a redirect may lead. Pure.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::Url;

use super::error::HttpError;
use crate::config::RemoteAddress;
use crate::printable;

/// The address of an image, or of where a redirect leads. Displayed without the query, which may be a
/// signature.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct HttpUrl(Url);

impl HttpUrl {
    /// Reads the address that the user gave.
    pub(super) fn parse(address: &RemoteAddress) -> Result<Self, HttpError> {
        let mut text = address.as_str().to_owned();
        if text.contains('#') || address.query().is_some_and(|query| query.contains('#')) {
            return Err(HttpError::Url("it has no part after '#': write %23".to_owned()));
        }
        if let Some(query) = address.query() {
            text.push('?');
            text.push_str(query);
        }
        let url = Url::parse(&text).map_err(|error| HttpError::Url(error.to_string()))?;
        let is_http = matches!(url.scheme(), "http" | "https") && url.has_host();
        let has_user = !url.username().is_empty() || url.password().is_some();
        match is_http && !has_user {
            true => Ok(Self(url)),
            false => Err(HttpError::Url("write https://HOST[:PORT]/PATH".to_owned())),
        }
    }

    /// Returns where a redirect from here to `location` leads.
    pub(super) fn redirected(&self, location: &str) -> Result<Self, HttpError> {
        let bad = || HttpError::Location(printable::line(location_shown(location)).into_owned());
        let mut url = self.0.join(location).map_err(|_| bad())?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(bad());
        }
        if self.is_encrypted() && url.scheme() == "http" {
            return Err(HttpError::Downgrade(Self(url).to_string()));
        }
        // What it was told by the server is no secret of ours to send there.
        if url.set_username("").is_err() || url.set_password(None).is_err() {
            return Err(bad());
        }
        url.set_fragment(None);
        Ok(Self(url))
    }

    /// Whether scheme, host and port are those of `other` (RFC 6454, 4).
    pub(super) fn is_same_origin(&self, other: &Self) -> bool {
        self.0.origin() == other.0.origin()
    }

    /// Whether the connection is encrypted.
    pub(super) fn is_encrypted(&self) -> bool {
        self.0.scheme() == "https"
    }

    /// Whether there is a query.
    pub(super) fn has_query(&self) -> bool {
        self.0.query().is_some()
    }

    /// Returns the host, with the port where it is not that of the scheme.
    pub(super) fn host(&self) -> String {
        let host = self.0.host_str().unwrap_or_default();
        match self.0.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }

    /// Returns the address to be asked.
    pub(super) fn url(&self) -> &Url {
        &self.0
    }

    /// Returns for how long the signature of this address holds from `now` on, as far as it says so: S3
    /// and Google name seconds beside a time, older ones a time since 1970.
    pub(super) fn lifetime(&self, now: SystemTime) -> Option<Duration> {
        let value = |names: [&str; 2]| {
            let mut pairs = self.0.query_pairs();
            pairs.find(|(name, _)| names.contains(&name.as_ref())).map(|(_, value)| value)
        };
        if let Some(seconds) = value(["X-Amz-Expires", "X-Goog-Expires"]) {
            return seconds.parse().ok().map(Duration::from_secs);
        }
        let since_1970 = Duration::from_secs(value(["Expires", "expires"])?.parse().ok()?);
        let end = UNIX_EPOCH.checked_add(since_1970)?;
        Some(end.duration_since(now).unwrap_or_default())
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.clone();
        shown.set_query(None);
        f.write_str(shown.as_str())
    }
}

impl fmt::Debug for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What may be shown of the `location` of a redirect.
fn location_shown(location: &str) -> &str {
    let shown = location.split(['?', '#']).next().unwrap_or_default();
    // A password may come before the host.
    if shown.contains('@') { "..." } else { shown.get(..200).unwrap_or(shown) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn url(text: &str) -> HttpUrl {
        HttpUrl::parse(&RemoteAddress::parse(text).unwrap()).unwrap()
    }

    #[test]
    fn an_address_is_shown_without_its_query() {
        let shown = url("https://h:444/a%20b?X-Amz-Signature=s3cret");
        assert_eq!(shown.to_string(), "https://h:444/a%20b");
        assert_eq!(format!("{shown:?} {}", shown.host()), "https://h:444/a%20b h:444");
        assert_eq!(shown.url().query(), Some("X-Amz-Signature=s3cret"));
        let refused = |text: &str| {
            let address = RemoteAddress::parse(text).unwrap();
            HttpUrl::parse(&address).unwrap_err().to_string()
        };
        assert!(refused("https://h/a#b").contains("%23"));
        assert!(refused("https://h/?a=s3cret#b").contains("%23"));
        for text in ["https://", "https://h:99999/", "https://[::1/", "http://:80/"] {
            let line = refused(text);
            assert!(!line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn a_redirect_leads_to_http_and_never_out_of_https() {
        let from = url("https://h/dir/a.img?token=1");
        assert_eq!(from.redirected("b.img").unwrap().to_string(), "https://h/dir/b.img");
        assert!(!from.redirected("b.img").unwrap().has_query());
        let other = from.redirected("https://me:pw@cdn:8443/x?sig=s3cret#part").unwrap();
        assert_eq!(other.url().as_str(), "https://cdn:8443/x?sig=s3cret");
        assert!(from.is_same_origin(&from.redirected("//h:443/").unwrap()));
        for elsewhere in ["https://h:444/", "https://i/", "//other/"] {
            assert!(!from.is_same_origin(&from.redirected(elsewhere).unwrap()));
        }
        let line = from.redirected("http://h/x?sig=s3cret").unwrap_err().to_string();
        assert!(line.contains("http://h/x") && !line.contains("s3cret"), "{line}");
        for bad in ["ftp://h/", "file:///etc/passwd?s3cret", "https://me:s3cret@:/", "data:x"] {
            let line = from.redirected(bad).unwrap_err().to_string();
            assert!(!line.contains("s3cret"), "{line}");
        }
        assert!(url("http://h/").redirected("http://i/").is_ok());
        assert!(url("http://h/").redirected("https://i/").is_ok());
    }

    #[test]
    fn the_lifetime_of_a_signature_is_read() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let of = |query: &str| url(&format!("https://h/?{query}")).lifetime(now);
        let secs = |secs| Some(Duration::from_secs(secs));
        assert_eq!(of("a=b&X-Amz-Expires=900"), secs(900));
        assert_eq!(of("X-Goog-Expires=60"), secs(60));
        assert_eq!(of("Expires=1000030&Signature=x"), secs(30));
        assert_eq!(of("Expires=999"), secs(0));
        assert_eq!(of("X-Amz-Expires=-1"), None);
        assert_eq!(of("Expires=99999999999999999999"), None);
        assert_eq!(of("x=y"), None);
    }

    proptest! {
        #[test]
        fn no_location_shows_what_is_after_its_question_mark(location in "[ -~]{0,40}", secret in "s3cret[a-z]{4}") {
            let from = url("https://h/dir/a.img");
            let shown = match from.redirected(&format!("{location}?{secret}")) {
                Ok(url) => url.to_string(),
                Err(error) => error.to_string(),
            };
            // A part before '#' is a path.
            prop_assert!(!shown.contains(&secret), "{}", shown);
        }
    }
}
