'use strict';

const show = (id, text) => { document.getElementById(id).textContent = text; };

/** The answer of `path` as { status, body }; body is undefined where none came. */
async function ask(path) {
  try {
    const reply = await fetch(path, { cache: 'no-store', signal: AbortSignal.timeout(4000) });
    return { status: reply.status, body: await reply.json() };
  } catch {
    return { status: 0, body: undefined };
  }
}

function span(seconds) {
  const parts = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']];
  const first = parts.findIndex(([size]) => seconds >= size);
  if (first < 0) return '0 s';
  return parts.slice(first, first + 2).map(([size, unit], place) => `${Math.floor((place ? seconds % parts[first][0] : seconds) / size)} ${unit}`).join(' ');
}

function verdict(health, ready) {
  if (!health.body?.status) return ['down', 'bad'];
  if (health.status !== 200) return [health.body.status, 'bad'];
  return ready.status === 200 ? ['healthy', 'good'] : ['not ready', 'poor'];
}

async function refresh() {
  const [health, ready, lists] = await Promise.all(['/api/health', '/api/ready', '/api/lists'].map(ask));
  const [word, tone] = verdict(health, ready);
  show('status', word);
  document.getElementById('status').className = `pill ${tone}`;
  show('health', health.body?.status ?? health.body?.error ?? 'the frontend is silent');
  show('ready', ready.body?.status ?? '–');
  show('uptime', health.body?.uptime === undefined ? '–' : span(health.body.uptime));
  show('memory', health.body?.memory ? `${(health.body.memory.rss / 1048576).toFixed(1)} MiB` : '–');
  show('version', health.body?.version ?? '–');
  show('mongodb', ready.body?.checks?.mongodb.status ?? '–');
  const keys = ready.body?.checks?.api_keys;
  show('keys', keys ? Object.keys(keys).filter((name) => keys[name]).join(', ') || 'none' : '–');
  const rows = Array.isArray(lists.body) ? lists.body.map(({ name, words }) => [name, `${words} words`]) : [['not to be had now', '']];
  document.getElementById('lists').replaceChildren(...(rows.length ? rows : [['none yet', '']]).map(([name, words]) => {
    const row = document.createElement('li');
    for (const text of [name, words]) row.append(Object.assign(document.createElement('span'), { textContent: text }));
    return row;
  }));
  const now = new Date();
  document.getElementById('asked').dateTime = now.toISOString();
  show('asked', now.toLocaleTimeString());
  setTimeout(refresh, 5000);
}

refresh();
