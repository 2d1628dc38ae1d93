'use strict';
/*
 * WordPecker under PM2: pm2 start ecosystem.config.js
 * What differs between machines comes from the environment, so that this file can be committed and run anywhere:
 *   WORDPECKER_BACKEND_PORT (3000), WORDPECKER_FRONTEND_PORT (3001), WORDPECKER_HOST (127.0.0.1), WORDPECKER_LOG_DIR (logs/),
 *   WORDPECKER_INSTANCES (1), WORDPECKER_EXEC_MODE (cluster), WORDPECKER_MAX_MEMORY (200M),
 *   MONGODB_URI, OPENAI_API_KEY, ELEVENLABS_API_KEY, PEXELS_API_KEY, or each of these four as NAME_FILE,
 *   WORDPECKER_DRILL (unset), WORDPECKER_DRILL_CRASH_AFTER_MS (unset).
 */
const path = require('node:path');

const setting = (name, normal) => process.env[name] || normal;
const given = (...names) => Object.fromEntries(names.filter((name) => process.env[name]).map((name) => [name, process.env[name]]));

const host = setting('WORDPECKER_HOST', '127.0.0.1'); // only this machine; put a reverse proxy in front to serve others
const backendPort = setting('WORDPECKER_BACKEND_PORT', '3000');
const logs = path.resolve(setting('WORDPECKER_LOG_DIR', path.join(__dirname, 'logs')));
const secrets = ['MONGODB_URI', 'OPENAI_API_KEY', 'ELEVENLABS_API_KEY', 'PEXELS_API_KEY'];

/** What holds for every app here. */
const careful = (name) => ({
  name,
  namespace: 'wordpecker', // `pm2 restart wordpecker` means both; neither app has this name itself, so it means nothing else
  cwd: __dirname,

  autorestart: true, // a crash is repaired at once, before anyone needs to be told
  min_uptime: '10s', // an app that dies sooner than this after its start has not started
  max_restarts: 10, // ten such starts and PM2 gives up: a program that cannot start is for a human. Beside a restart delay PM2
  // then shows "waiting restart" where it would show "errored", and waits for nothing
  exp_backoff_restart_delay: 200, // wait 0.2 s, 0.3 s, 0.45 s ... up to 15 s, so that a crash loop does not eat the machine
  kill_timeout: 5000, // after SIGINT the app finishes its requests for 3 s; PM2 kills it only when that has clearly failed
  wait_ready: true, // "online" means "listening": a reload ends the old process only once the new one has said it is ready
  listen_timeout: 8000, // and goes on without that word after 8 s

  out_file: path.join(logs, `${name}-out.log`),
  error_file: path.join(logs, `${name}-error.log`),
  merge_logs: true, // all instances write one file, and scaling does not scatter the logs
  log_date_format: 'YYYY-MM-DDTHH:mm:ss.SSSZ', // ISO 8601 with the offset: sortable, and clear across time zones

  watch: false, // files that change on a server (logs, uploads) must not restart it
  vizion: false, // no git commands at every start
  // PM2 gives each app the whole environment of the shell that starts it, and saves it in dump.pm2 for all to read. The app's
  // own secrets are named below; keep those of other programs out.
  filter_env: ['_KEY', '_TOKEN', '_SECRET', 'PASSWORD', 'PASSWD', 'CREDENTIAL', 'AWS_', 'GITHUB_', 'SSH_', 'MONGODB_'],
});

module.exports = {
  apps: [
    {
      ...careful('wordpecker-backend'),
      script: 'backend/server.js',
      exec_mode: setting('WORDPECKER_EXEC_MODE', 'cluster'), // even one instance: `pm2 reload` without a gap, and `pm2 scale` works
      instances: Number(setting('WORDPECKER_INSTANCES', '1')), // more only with MongoDB: without it each instance has its own words
      max_memory_restart: setting('WORDPECKER_MAX_MEMORY', '200M'), // it needs about 70M: room for a busy hour, none for a leak
      env: {
        NODE_ENV: 'production',
        HOST: host,
        PORT: backendPort,
        ...given(...secrets, ...secrets.map((name) => `${name}_FILE`), 'WORDPECKER_DRILL', 'WORDPECKER_DRILL_CRASH_AFTER_MS'),
      },
    },
    {
      ...careful('wordpecker-frontend'),
      script: 'frontend/server.js',
      exec_mode: 'fork',
      instances: 1,
      max_memory_restart: '150M', // it holds a few small files and grows with nothing
      env: {
        NODE_ENV: 'production',
        HOST: host,
        PORT: setting('WORDPECKER_FRONTEND_PORT', '3001'),
        BACKEND_URL: `http://${host === '0.0.0.0' ? '127.0.0.1' : host}:${backendPort}`,
      },
    },
  ],
};
